"""Whether ranks that hold copies of the same weights hold the same: a machine may compute wrongly without a word.

Each rank hashes its copies; the hashes are compared. Nothing is sent but a few numbers, unless they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import xxhash
from torch import Tensor

from bigtrain.dist import World
from bigtrain.errors import DivergedError
from bigtrain.state import BUFFER, EMA, WEIGHT, EngineState, Piece, whole

_CHUNK = 1 << 22  # elements hashed at once on a device: bounds what it needs beside the weights
_WORD = 1 << 64


class Replicas:
    """Compares the copies of weights and buffers that ranks hold.

    Args:
        world: The ranks.
        state: This rank's part of the training state.
        every: Compare after this many steps; None: never, not even before a checkpoint.
    """

    def __init__(self, world: World, state: Callable[[], EngineState], every: int | None) -> None:
        self._world, self._state, self._every = world, state, every
        self._compared: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether the step is one after which they are compared."""
        return self._every is not None and step % self._every == 0

    def compare(self, step: int) -> None:
        """Compare, unless that was done after this step already. Every rank must call it.

        Args:
            step: How many steps have been taken.

        Raises:
            DivergedError: On every rank, naming the rank and the first of its weights that differs.
        """
        if self._every is None or self._world.size == 1 or self._compared == step:
            return
        self._compared = step
        groups = _groups(self._state().pieces)
        hashes = [digests([piece.data for piece in pieces]) for pieces in groups]
        mine = [(_signature(pieces), _join(found)) for pieces, found in zip(groups, hashes, strict=True)]
        of_ranks = self._world.all_gather_object(mine)
        if all(_agree([ranks[group] for ranks in of_ranks]) for group in range(len(groups))):
            return
        named = [
            {f"{piece.kind} {piece.name} {piece.box}": value for piece, value in zip(pieces, found, strict=True)}
            for pieces, found in zip(groups, hashes, strict=True)
        ]
        raise _explain(step, self._world.all_gather_object({k: v for part in named for k, v in part.items()}))


def _groups(pieces: Iterable[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Pieces that are whole tensors, and pieces that are parts: other ranks may hold the same or others."""
    held = [piece for piece in pieces if piece.kind in (WEIGHT, BUFFER, EMA)]
    is_whole = [piece.box == whole(piece.shape) for piece in held]
    return (
        [piece for piece, it_is in zip(held, is_whole, strict=True) if it_is],
        [piece for piece, it_is in zip(held, is_whole, strict=True) if not it_is],
    )


def _signature(pieces: Sequence[Piece]) -> int:
    words = "\n".join(f"{piece.kind} {piece.name} {piece.box}" for piece in pieces)
    return xxhash.xxh3_64_intdigest(words.encode())


def _join(hashes: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little") for value in hashes))


def _agree(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether ranks with pieces of the same name and place have the same values."""
    return len(set(pairs)) == len({signature for signature, _ in pairs})


def _explain(step: int, of_ranks: Sequence[dict[str, int]]) -> DivergedError:
    """Name the rank that differs from most; of two, the second."""
    for name in of_ranks[0] | {name: 0 for ranks in of_ranks for name in ranks}:
        held = {rank: hashes[name] for rank, hashes in enumerate(of_ranks) if name in hashes}
        values = list(held.values())
        usual = max(dict.fromkeys(values), key=values.count)
        wrong = [rank for rank, value in held.items() if value != usual]
        if wrong:
            ranks = f"rank {wrong[0]} holds" if len(wrong) == 1 else f"ranks {', '.join(map(str, wrong))} hold"
            kind, tensor = name.split(" ")[:2]
            return DivergedError(
                f"after step {step} {ranks} another {kind} {tensor} than the other ranks, which hold copies of it",
                where=f"rank {wrong[0]}, {tensor}",
                remedy="a machine has computed or remembered wrongly: go on from the last checkpoint, which is good;\n"
                "if it is the same rank again, leave out its machine (exclude in a cluster's profile)",
            )
    raise AssertionError("the hashes differ in nothing")


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """A hash of each tensor's bytes, 64 bits; on a device it is made there, and waited for once."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [xxhash.xxh3_64_intdigest(_bytes(tensor).numpy().data) for tensor in tensors]
    return [value % _WORD for value in torch.stack([weighted_sum(tensor) for tensor in tensors]).tolist()]


def weighted_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words, each times an odd number of its own, modulo 2**64; int64, shape ().

    An odd factor has an inverse modulo 2**64, so no change of a single word leaves the sum as it was.
    """
    raw = _bytes(tensor)
    num_words = raw.numel() // 4
    words, rest = raw[: 4 * num_words].view(torch.int32), raw[4 * num_words :]
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for begin in range(0, num_words, _CHUNK):
        part = words[begin : begin + _CHUNK].to(torch.int64)
        factors = torch.arange(begin, begin + part.numel(), device=raw.device) * 2 + 1
        total += (part * factors).sum()
    factors = (torch.arange(rest.numel(), device=raw.device) + num_words) * 2 + 1
    return total + (rest.to(torch.int64) * factors).sum()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
