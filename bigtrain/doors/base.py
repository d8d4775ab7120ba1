"""Frozen weights that a checkpoint leaves in the file that they came from, each known by a digest.

A run that trains a small part of pretrained weights need not save the rest (`checkpoint.weights: trainable`). Its
checkpoints say what they leave out and which file has it, so that whoever reads one finds it whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.layout import Key
from bigtrain.checkpoint.reading import in_parts
from bigtrain.checkpoint.shards import DTYPES, TORCH_DTYPES
from bigtrain.dist import World
from bigtrain.errors import CheckpointError, StateError
from bigtrain.finetune.digest import digest
from bigtrain.state import WEIGHT, EngineState, Piece, Reader, TensorSpec, whole

_AT_ONCE = 1 << 22  # elements
_MOST_NAMED = 5


@dataclass(frozen=True)
class Left:
    """A parameter that is left out.

    Attributes:
        source: What the file calls it.
        spec: Its shape and dtype in the state.
        digest: Of its elements in that dtype.
    """

    source: Key
    spec: TensorSpec
    digest: int


@dataclass(frozen=True)
class Base:
    """What a checkpoint leaves out.

    Attributes:
        path: The checkpoint, file or folder that has it.
        tensors: Each parameter, by name.
        as_gpt: Whether the sources are a Llama's tensors by the names of our gpt.
    """

    path: Path
    tensors: Mapping[str, Left]
    as_gpt: bool = True

    def only(self, names: Collection[str]) -> Base | None:
        """This, of fewer parameters; None where none is left."""
        kept = {name: left for name, left in self.tensors.items() if name in names}
        return replace(self, tensors=kept) if kept else None

    def found(self, instead: Path | None) -> Base:
        """This where it is now: where it was, or else at another place, if one is known."""
        return self if self.path.exists() or instead is None else replace(self, path=instead.absolute())

    def as_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        tensors = {
            name: [*left.source, list(left.spec.shape), DTYPES[left.spec.dtype], left.digest]
            for name, left in self.tensors.items()
        }
        return {"path": str(self.path), "tensors": tensors, "as_gpt": self.as_gpt}

    def check(self, found: Mapping[str, int]) -> None:
        """Compare digests with those of what was read.

        Raises:
            StateError: Where they differ: it is another file.
        """
        wrong = [name for name, value in found.items() if value != self.tensors[name].digest]
        if wrong:
            more = f" … ({len(wrong)} in all)" if len(wrong) > _MOST_NAMED else ""
            raise StateError(
                f"these are not the weights that the checkpoint leaves out: {', '.join(wrong[:_MOST_NAMED])}{more}",
                where=str(self.path),
                remedy="put back the file that the run began with, or say where it is (finetune.init_from; --base of "
                "`bigtrain ckpt export`)",
            )


def base_of(extra: Mapping[str, Any]) -> Base | None:
    """What a checkpoint leaves out; None where it is whole.

    Args:
        extra: What it keeps beside the state.

    Raises:
        CheckpointError: Where that is not what `as_dict` makes.
    """
    if "base" not in extra:
        return None
    try:
        tensors = {
            name: Left((kind, theirs), TensorSpec(tuple(shape), TORCH_DTYPES[dtype]), int(value))
            for name, (kind, theirs, shape, dtype, value) in extra["base"]["tensors"].items()
        }
        return Base(Path(extra["base"]["path"]), tensors, bool(extra["base"].get("as_gpt", True)))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"what the checkpoint leaves out is not said as it should be: {error!r}") from error


def digests_of(pieces: Iterable[Piece], names: Collection[str], world: World) -> dict[str, int]:
    """The digest of each of some weights, put together from all ranks' parts. Every rank must call it."""
    place = {name: position for position, name in enumerate(sorted(names))}
    sums = torch.zeros(len(place), dtype=torch.int64)
    for piece in pieces:
        if piece.kind == WEIGHT and piece.is_owner and piece.name in place:
            sums[place[piece.name]] += digest(piece.data, piece.shape, piece.box)
    world.all_reduce(sums)
    return {name: int(sums[position]) for name, position in place.items()}


def digests_in(reader: Reader, base: Base) -> dict[str, int]:
    """The digest of each weight that is left out, as a file has it; some rows at a time."""
    found = {}
    for name, left in base.tensors.items():
        total = torch.zeros((), dtype=torch.int64)
        for part in in_parts(whole(left.spec.shape), _AT_ONCE):
            scratch = torch.empty(part.size, dtype=left.spec.dtype)
            reader.read_into(*left.source, part, scratch)
            total += digest(scratch, left.spec.shape, part)
        found[name] = int(total)
    return found


def without(state: EngineState, base: Base | None) -> EngineState:
    """A state without the weights that are left out."""
    if base is None:
        return state
    kept = [piece for piece in state.pieces if not (piece.kind == WEIGHT and piece.name in base.tensors)]
    return EngineState(kept, state.hyper)
