"""What a checkpoint holds besides the engine's state, and going on from one: exactly, or not at all.

Under the same engine and number of ranks a run goes on bit for bit as it would have: data position, random numbers
and step counters are those of the checkpoint. Under another number of ranks, each rank's random numbers (dropout's)
are drawn anew from (seed, rank, step): there is no stream that they could go on with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml
from torch import Tensor

from bigtrain.catalogue import HUGGING_FACE
from bigtrain.checkpoint import CheckpointReader, Ranks, load_newest, open_checkpoint
from bigtrain.checkpoint.files import Files
from bigtrain.config.loader import Change, diff, dump, loads
from bigtrain.config.schema import Config
from bigtrain.doors import open_whole
from bigtrain.doors.base import Base, base_of, digests_of, without
from bigtrain.errors import ConfigError, RunFolderError
from bigtrain.finetune.adapters import transposed_layers
from bigtrain.finetune.freeze import phase_at
from bigtrain.goals import Standing
from bigtrain.prepare import seed_everything
from bigtrain.pretrained import find_weights
from bigtrain.progress import Outcome
from bigtrain.saving import Source
from bigtrain.state import WEIGHT, Box, EngineState, Reader, TensorSpec
from bigtrain.trainer import Training

# What a run cannot change when it goes on, and why not.
_FIXED = {
    "run.seed": "the order of the samples follows from it",
    "task": "it would be another training",
    "model": "it would be another model",
    "finetune.adapter": "it would be another model",
    "optim.name": "its state is another optimizer's",
}
# What says where and how a run is kept, not what it computes: a change of it is not worth a word.
_UNSAID = ("run.name", "run.dir", "launch", "track", "checkpoint", "profile")

Key = tuple[str, str]

_LARGEST_KEPT = 10_000  # elements of a tensor among an evaluation's numbers


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from.

    Attributes:
        outcome: How far it had come.
        path: The checkpoint.
        words: What to tell the user, line by line.
        frozen: What `PhaseProof.as_kept` gave when its phase began; empty where there was no plan.
    """

    outcome: Outcome
    path: Path
    words: list[str]
    frozen: Mapping[str, Any]


class OtherPhaseError(Exception):
    """A checkpoint is of another phase of the freeze plan than the training was built for: build it for that one."""

    def __init__(self, phase: int) -> None:
        super().__init__(f"the checkpoint is of phase {phase}")
        self.phase = phase


def source_of(current: Callable[[], Training]) -> Source:
    """What checkpoints of a run are made of.

    Args:
        current: The training as it is built now.
    """
    config, world = current().config, current().world

    def extra(outcome: Outcome) -> dict[str, Any]:
        training = current()
        return {
            "samples": outcome.samples,
            "position": list(outcome.position),
            "num_skipped": outcome.num_skipped,
            "recent_losses": outcome.recent,
            "evaluation": {name: kept for name, value in outcome.evaluation.items() if (kept := _kept(value)) != []},
            "steps": outcome.steps,
            "standings": {name: asdict(standing) for name, standing in outcome.standings.items()},
            "phase": training.phase,
            "fingerprint": training.fingerprint,
            **({"class_names": training.class_names} if training.class_names else {}),
            "config": dump(config),
            "engine": training.engine_label,
            "world_size": world.size,
            "torch": str(torch.__version__),
            **({"transposed": turned} if (turned := transposed_layers(training.model)) else {}),
            **({"frozen": dict(training.frozen)} if training.frozen else {}),
            **({"base": training.base.as_dict()} if training.base else {}),
        }

    return Source(lambda: saved_state(current()), extra, lambda: {"random": random_state(world.device)})


def saved_state(training: Training) -> EngineState:
    """This rank's part of what a checkpoint holds."""
    return without(training.engine.state(), training.base)


def resume(training: Training, folder: Path) -> Resumed | None:
    """Go on from the newest good checkpoint of a run; None where there is none. Every rank must call it.

    Raises:
        RunFolderError: On all ranks, where the run file or the data have changed in a way that a run cannot go on
            with; nothing was changed.
        StateError: On all ranks, listing everything in the state that does not fit the model.
        CheckpointError: Where checkpoints are there and none can be read.
        OtherPhaseError: On all ranks, where the training has to be built for another phase.
    """
    world, config = training.world, training.config
    changes: list[Change] = []

    def opened(path: Path, files: Files) -> CheckpointReader:
        return open_whole(path, files, instead=weights_of(config), verifies=False)

    def load(reader: Reader) -> None:
        kept: Mapping[str, Any] = reader.extra  # type: ignore[attr-defined]
        _refuse_brought_in(kept, folder)
        changes[:] = changes_since(kept, config)
        _refuse_changes(changes, kept, training, folder, reader.index)
        phase = phase_at(config.finetune, kept["steps"], kept["position"][0])
        if phase != training.phase:
            raise OtherPhaseError(phase)
        is_tuned = any(change.key.startswith(("optim.", "finetune.")) for change in changes)
        training.engine.load(fitted(reader, training, is_tuned=is_tuned))
        training.base = _checked_base(kept, training)

    reader = load_newest(Ranks(world), folder, load, opened=opened)
    if reader is None:
        return None
    with reader:
        kept = reader.extra
        outcome = Outcome(
            steps=reader.step,
            samples=kept["samples"],
            evaluation=dict(kept["evaluation"]),
            num_skipped=kept["num_skipped"],
            position=(kept["position"][0], kept["position"][1]),
            standings={name: Standing(**values) for name, values in kept.get("standings", {}).items()},
            recent=list(kept.get("recent_losses", ())),
        )
        has_random = reader.num_writers == world.size and "random" in reader.own(world.rank)
        if has_random:
            set_random_state(reader.own(world.rank)["random"], world.device)
        else:
            word = xxhash.xxh64_intdigest(f"{config.run.seed}/{world.rank}/{reader.step}".encode())
            seed_everything(word >> 1)
        words = list(_words(reader, changes, world.size, has_random=has_random))
        return Resumed(outcome, reader.path, words, kept.get("frozen", {}))


def weights_of(config: Config) -> Path | None:
    """Where the weights are now that the run began with; None where the run file does not say."""
    return find_weights(config, may_download=False) if config.begins_with else None


def _checked_base(kept: Mapping[str, Any], training: Training) -> Base | None:
    """What the checkpoints of this run leave out from now on. Every rank must call it.

    Raises:
        StateError: On all ranks, where what was loaded is not what the checkpoint left out.
    """
    left_out = base_of(kept)
    if left_out is None:
        return None
    base = left_out.found(weights_of(training.config))
    base.check(digests_of(training.engine.state().pieces, base.tensors, training.world))
    is_wanted = training.config.leaves_frozen
    return base.only(training.freezing.frozen_in(training.phase)) if is_wanted else None


def phase_of(path: Path, config: Config) -> int:
    """The phase of the freeze plan in which a run goes on from a checkpoint."""
    with open_checkpoint(path) as reader:
        return phase_at(config.finetune, reader.extra["steps"], reader.extra["position"][0])


def fitted(reader: Reader, training: Training, *, is_tuned: bool) -> Reader:
    """A reader whose hyperparameters are those that the training is to go on with.

    Args:
        reader: A checkpoint, which has `extra`, too.
        training: As it is built.
        is_tuned: Whether the run file has changed them.
    """
    # Where a phase begins, the checkpoint has the rates of the one before, and none for what begins to train.
    is_new_phase = reader.extra["phase"] != training.phase  # type: ignore[attr-defined]
    return _WithHyper(reader, training.engine.state().hyper) if is_tuned or is_new_phase else reader


def changes_since(kept: Mapping[str, Any], config: Config) -> list[Change]:
    """What has changed in a run file since a checkpoint, whose `extra` is given."""
    try:
        before = loads(kept["config"])
    except (ConfigError, yaml.YAMLError):
        return []  # written by a version with other keys: the state itself is checked all the same
    return diff(before, loads(dump(config)))


def _refuse_brought_in(kept: Mapping[str, Any], folder: Path) -> None:
    """Refuse what another library wrote: it has no place in the data."""
    if "config" not in kept:
        raise RunFolderError(
            "the newest checkpoint was brought in: it is weights to start from, and no run to go on with",
            where=str(folder),
            remedy="take it out of this folder, and begin a run with finetune.init_from=<its path>",
        )


def _refuse_changes(
    changes: list[Change], kept: Mapping[str, Any], training: Training, folder: Path, index: Collection[Key]
) -> None:
    wrong = [
        f"{change.key} was {change.before!r} and is {change.after!r}: {why}"
        for change in changes
        for key, why in _FIXED.items()
        if (change.key == key or change.key.startswith(key + ".")) and not _is_moved_folder(change)
    ]
    wrong += [
        f"precision was {change.before} and is {change.after}: the state is kept in another kind of numbers"
        for change in changes
        if change.key == "precision" and "fp64" in (change.before, change.after)
    ]
    wrong += _lacking(changes, training, index)
    if kept["fingerprint"] != training.fingerprint:
        wrong.append("the data are not those that the run has been trained on: their fingerprint has changed")
    if wrong:
        raise RunFolderError(
            f"the run {training.config.run.name} cannot go on:\n  " + "\n  ".join(wrong),
            where=str(folder),
            remedy="put back what has changed; or begin a new run under another run.name",
        )


def _is_moved_folder(change: Change) -> bool:
    """Whether the model is still that of a folder, which lies elsewhere now; the state tells whether it fits."""
    names = (change.before, change.after)
    return change.key == "model.name" and all(str(name).startswith(HUGGING_FACE) for name in names)


def _lacking(changes: list[Change], training: Training, index: Collection[Key]) -> Iterator[str]:
    """What the optimizer's arguments, having changed, ask of its state that a checkpoint does not hold."""
    if not any(change.key.startswith("optim.args") for change in changes):
        return
    held: dict[str, set[str]] = {}
    for kind, name in index:
        held.setdefault(name, set()).add(kind)
    dims = {piece.name: len(piece.shape) for piece in training.engine.state().pieces if piece.kind == WEIGHT}
    for name in (name for group in training.plan.groups for name in group.names):
        missing = training.plan.slots(dims.get(name, 1)) - held.get(name, set()) - {"momentum_buffer"}  # begins at zero
        if missing and len(held.get(name, ())) > 1:
            yield f"optim.args has changed: the optimizer needs {', '.join(sorted(missing))} now, which it never kept"
            return


def _words(reader: CheckpointReader, changes: list[Change], size: int, *, has_random: bool) -> Iterator[str]:
    kept = reader.extra
    ranks = f"{kept['world_size']} process{'es' if kept['world_size'] > 1 else ''}"
    yield f"going on from step {reader.step}, saved by {kept['engine']} on {ranks}: {reader.path}"
    said = [change for change in changes if not any(change.key.startswith(key) for key in _UNSAID)]
    for change in said:
        yield f"changed: {change.key} was {change.before!r} and is {change.after!r}"
    if not has_random:
        was_brought_in = reader.num_writers == size
        why = "the checkpoint was brought in" if was_brought_in else "the number of processes is another"
        yield f"{why}: random numbers (dropout's) are drawn anew"


def _kept(value: Any) -> Any:
    """A number of an evaluation as JSON keeps it; an empty list for what is too large."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, int | float | str) else []
    return value.tolist() if value.numel() <= _LARGEST_KEPT else []


class _WithHyper:
    """A reader whose hyperparameters are the run file's, which has changed them."""

    def __init__(self, reader: Reader, hyper: Mapping[str, Mapping[str, Any]]) -> None:
        self._reader = reader
        self.hyper = hyper
        self.index: Mapping[tuple[str, str], TensorSpec] = reader.index

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        self._reader.read_into(kind, name, box, out)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's random number generators, as plain values and bytes."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tobytes(), *(type(part)(part) for part in rest)),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put this process's random number generators where `random_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["device"]), dtype=torch.uint8), device)
