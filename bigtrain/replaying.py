"""Steps of a run again, from its last checkpoint before them, with their exact samples: for a debugger.

Nothing is written into the run's folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from bigtrain import engines
from bigtrain.checkpoint import find
from bigtrain.checkpoint.folders import step_of
from bigtrain.config.schema import Config
from bigtrain.dist import join
from bigtrain.doors import open_whole
from bigtrain.errors import RunFolderError
from bigtrain.loop import Loop
from bigtrain.pretrained import start_from
from bigtrain.progress import Cadence, Hook, Outcome, StepInfo
from bigtrain.resuming import changes_since, fitted, phase_of, set_random_state, weights_of
from bigtrain.running import lack_of_memory_explained, torch_set_up
from bigtrain.runs import checkpoints_of
from bigtrain.tracking.reading import RunRecord
from bigtrain.trainer import Subject, Training, assemble

Say = Callable[[str], None]

_OTHERS = "the run had {} processes: random numbers (dropout's) are other ones here"
# Where a change lets a run's steps come out otherwise.
_TRAINED_BY = ("model.", "data.", "task.", "train.", "optim.", "finetune.", "engine.", "precision")


def replay(
    run: RunRecord,
    step: int,
    say: Say,
    *,
    subject: Subject | None = None,
    detect_anomaly: bool = False,
    stop_before: bool = False,
) -> list[dict[str, Any]]:
    """Train up to and with a step of a run again.

    Args:
        run: The run.
        step: The last step that is taken; the first one is 1.
        say: Told of every step, on rank 0.
        subject: What the user brings as objects, as it was given when the run was trained.
        detect_anomaly: Let autograd name the forward operation of a gradient that is not a number.
        stop_before: Call `breakpoint()` before the last step.

    Returns:
        The rows of these steps.

    Raises:
        RunFolderError: Where the step is not one of the run's.
    """
    config = run.config
    if not 1 <= step <= run.step:
        raise RunFolderError(f"step {step} is none of the run's: it has {run.step}", remedy="give a step from 1 on")
    name, _ = engines.choose(config.engine.name, int(os.environ.get("WORLD_SIZE", 1)))
    path = next((path for path in find(checkpoints_of(run.path)) if (step_of(path) or 0) < step), None)
    phase = phase_of(path, config) if path else 0
    with (
        torch_set_up(config),
        join(config.engine.device, needs_group=engines.needs_group(name)) as world,
        lack_of_memory_explained(config, world, name),
        closing(assemble(config, world, subject or Subject(), phase=phase)) as training,
    ):

        def tell(text: str) -> None:
            if world.is_main:
                say(text)

        done = _load(training, run, path, tell)
        done.position = _position_of(run, done)
        training.go_on_from(done)
        rows = _Rows(run, tell)
        loop = _loop(training, done, step, rows, stop_before=stop_before)
        with torch.autograd.set_detect_anomaly(True) if detect_anomaly else nullcontext():
            reached = loop.run().steps
    if reached < step:
        raise RunFolderError(
            f"what trains changes after step {reached}, and there is no checkpoint of that step any more",
            remedy="give a step up to it; or keep more checkpoints (checkpoint.keep)",
        )
    return rows.rows


def _load(training: Training, run: RunRecord, path: Path | None, tell: Say) -> Outcome:
    """Put the training where a checkpoint has it."""
    if path is None:
        tell("there is no checkpoint before that step: from the beginning")
        start_from(training)
        known = (event["world_size"] for event in run.events if event["event"] == "start" and "world_size" in event)
        if (num_ranks := next(known, training.world.size)) != training.world.size:
            tell(_OTHERS.format(num_ranks))
        return Outcome()
    with open_whole(path, instead=weights_of(training.config)) as reader:
        kept = reader.extra
        training.engine.load(fitted(reader, training, is_tuned=False))
        tell(f"from step {reader.step}: {path}")
        changes = [each for each in changes_since(kept, training.config) if each.key.startswith(_TRAINED_BY)]
        if changes:
            said = ", ".join(f"{each.key}: {each.before} → {each.after}" for each in changes)
            tell(f"the run file has changed since: {said}; hyperparameters are the checkpoint's here, all else is new")
        own = reader.own(training.world.rank) if reader.num_writers == training.world.size else {}
        if "random" in own:
            set_random_state(own["random"], training.world.device)
        elif reader.num_writers == training.world.size:
            tell("the checkpoint was brought in: random numbers (dropout's) are other ones here")
        else:
            tell(_OTHERS.format(reader.num_writers))
        return Outcome(reader.step, kept["samples"], position=(kept["position"][0], kept["position"][1]))


def _position_of(run: RunRecord, done: Outcome) -> tuple[int, int]:
    """Where the run went on in its data: further on than its checkpoint says, where a spike led back to that."""
    led_back = [row for row in run.events if row["event"] == "rollback" and row["step"] == done.steps]
    epoch, offset = led_back[-1]["position"] if led_back else done.position
    return epoch, offset


def _loop(training: Training, done: Outcome, step: int, rows: _Rows, *, stop_before: bool) -> Loop:
    def before_last(info: StepInfo) -> None:
        if info.step == step - 1:
            breakpoint()  # what was asked for

    hooks = [Hook(before_last)] if stop_before else []
    if stop_before and done.steps == step - 1:
        breakpoint()
    # The schedule keeps the run's own length; only the loop ends sooner, and evaluates where the run did.
    cadence = training.cadence
    training.config = _telling_of_spikes(training.config)
    training.cadence = Cadence(step, 1, cadence.eval_every_steps, cadence.eval_every_epochs, cadence.phase_at)
    return training.loop([rows] if training.world.is_main else [], hooks, None, done)


def _telling_of_spikes(config: Config) -> Config:
    """The same run, which passes through a spike to the step that was asked for."""
    return config.model_copy(update={"health": config.health.model_copy(update={"on_spike": "tell"})})


class _Rows:
    """Says every step, beside what the run had logged for it."""

    def __init__(self, run: RunRecord, tell: Say) -> None:
        self.rows: list[dict[str, Any]] = []
        self._tell = tell
        self._logged = {row["step"]: row["loss"] for row in run.rows if "loss" in row}

    def log(self, row: Mapping[str, Any]) -> None:
        if "loss" not in row:
            return
        self.rows.append(dict(row))
        before = self._logged.get(row["step"])
        beside = ""
        if before is not None:
            beside = ", as the run had it" if before == row["loss"] else f"; the run had {before!r}"
        self._tell(f"step {row['step']}: loss {row['loss']!r}, norm {row['grad_norm']!r}{beside}")

    def close(self) -> None:
        pass
