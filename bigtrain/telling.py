"""What rank 0 tells of a run: to whom its numbers go, its first and last words, its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint import find_best
from bigtrain.config.schema import Config
from bigtrain.dist import World
from bigtrain.early import StoppedEarly
from bigtrain.errors import BigtrainError
from bigtrain.goals import BEST, PATIENCE
from bigtrain.prepare import COMPUTE_DTYPES, DTYPES
from bigtrain.progress import Outcome
from bigtrain.report import write_report
from bigtrain.runs import RunFolder, write_atomically
from bigtrain.tracking.base import Tracker, closing_all
from bigtrain.tracking.console import Console
from bigtrain.tracking.making import make_trackers
from bigtrain.tracking.mfu import Derived, Utilisation, utilisation
from bigtrain.tracking.repro import write_repro
from bigtrain.tracking.wording import decimal
from bigtrain.trainer import Training

# Larger results (the confusion matrix of thousands of classes) do not go into result.json.
_LARGEST_IN_RESULT = 10_000


@dataclass(frozen=True)
class Telling:
    """Where a run's numbers and words go; nowhere, on every rank but the first.

    Attributes:
        trackers: Those that take rows.
        console: The terminal.
        flush: Writes those rows that wait to be written.
    """

    trackers: Sequence[Tracker] = ()
    console: Console | None = None
    flush: Callable[[], None] = lambda: None

    def tell(self, row: Mapping[str, Any]) -> None:
        """Hand a row to all trackers, with the time."""
        row = {**row, "time": round(time.time(), 3)}
        for tracker in self.trackers:
            tracker.log(row)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.console is not None:
            self.console.say(text)

    def leave_view(self) -> None:
        """Say what follows below the live view, which has come to its end."""
        if self.console is not None:
            self.console.leave_view()

    def close(self) -> None:
        """Let every tracker write what is left."""
        closing_all(self.trackers).close()


def begin_telling(
    training: Training, folder: RunFolder, done: int, words: Sequence[str], steps: Callable[[], int]
) -> Telling:
    """Make the trackers of a start, and say its first words. Only rank 0 may call it.

    Args:
        training: What trains.
        folder: Its folder.
        done: The step that it goes on from.
        words: What there is to say of that.
        steps: Asked for the number of steps taken.
    """
    config, total = training.config, training.cadence.total_steps
    log = folder.logs / "rank-00000.stdout"
    with ExitStack() as until_begun:  # where that fails, no thread and no process stays in a notebook
        console = Console(total, config.track.progress, log, title=config.run.name, step=steps)
        until_begun.callback(console.close)
        console.say("\n".join([_first_lines(training), *words]))
        changed = write_repro(folder.path, folder.number, _gpus(training.world))
        written = make_trackers(
            config,
            folder.path,
            folder.logs / "trackers.log",
            console.say,
            engine=training.engine.name,
            world_size=training.world.size,
            step=done,
        )
        until_begun.callback(written.close)
        telling = Telling(_derived([written, console], training, console), console, written.flush)
        _tell_start(telling, training, folder.number, done, changed)
        until_begun.pop_all()
    return telling


def _tell_start(telling: Telling, training: Training, attempt: int, done: int, changed: Sequence[str]) -> None:
    """Tell that a start of the run has begun, and what it will not come to."""
    telling.tell(
        {
            "step": done,
            "event": "start",
            "attempt": attempt,
            "engine": training.engine_label,
            "world_size": training.world.size,
            "precision": training.config.precision,
            **({"changed": ", ".join(changed)} if changed else {}),
        }
    )
    for text in _never_reached(training):
        telling.tell({"step": done, "event": "warning", "text": text})


def _never_reached(training: Training) -> Iterator[str]:
    """What the run file has planned for later than the run's end."""
    warmup, total = training.config.optim.schedule.warmup_steps, training.cadence.total_steps
    if warmup > total:
        yield f"optim.schedule.warmup_steps is {warmup}, and the run has {total} steps: it never reaches its full rate"
    for key, moment in training.unreached().items():
        yield f"{key} begins after step {moment}, and the run has {total} steps: it never begins"


def finish_telling(
    telling: Telling, folder: RunFolder, outcome: Outcome, training: Training, examples: Sequence[Mapping[str, Any]]
) -> None:
    """Keep what a run came to, write its report, and say its last words."""
    total = training.cadence.total_steps
    telling.leave_view()
    if outcome.stopped:
        telling.tell({"step": outcome.steps, "event": "stop"})
        report(telling, folder, training.config)
        way = "the same command" if training.config.checkpoint.resume == "auto" else "with checkpoint.resume=auto it"
        how = "" if outcome.again else f"; {way} goes on from there"
        telling.say(f"stopped after step {outcome.steps} of {total}, as asked: {folder.path}{how}")
        return
    best, patience = outcome.standings.get(BEST), outcome.standings.get(PATIENCE)
    is_early = outcome.steps < total and patience is not None
    if is_early and patience:
        text = f"no evaluation has been better than {patience} for {patience.since} in a row"
        telling.tell({"step": outcome.steps, "event": "early stop", "text": text})
    if examples:
        with suppress(OSError):  # a full disk: what matters more says so
            write_atomically(folder.path / "samples.json", json.dumps(list(examples)) + "\n")
    numbers = {name: _plain(value) for name, value in outcome.evaluation.items() if _is_small(value)}
    folder.finish(
        {
            "steps": outcome.steps,
            "samples": outcome.samples,
            "skipped_steps": outcome.num_skipped,
            "engine": training.engine.name,
            "world_size": training.world.size,
            "metrics": numbers,
            **({"stopped_early": True} if is_early else {}),
            **({"best": asdict(best)} if best else {}),
            **({"class_names": training.class_names} if training.class_names else {}),
        }
    )
    scores = "  ".join(f"{name} {decimal(value)}" for name, value in numbers.items() if isinstance(value, float))
    telling.say(
        f"done: {outcome.steps} steps, {outcome.samples} samples" + (f"\nevaluation: {scores}" if scores else "")
    )
    kept = find_best(folder.checkpoints) if best else None
    if kept:
        telling.say(f"best: {best}: {kept}")
    report(telling, folder, training.config)
    telling.say(f"run folder: {folder.path}")


def report(telling: Telling, folder: RunFolder, config: Config) -> None:
    """Write the report of what there is; it must not make a run fail that went well."""
    if not config.track.report:
        return
    telling.flush()
    try:
        telling.say(f"report: {write_report(folder.path)}")
    except Exception as error:
        telling.say(f"warning: there is no report: {type(error).__name__}: {error}")


def tell_failure(telling: Telling, folder: RunFolder, step: int, error: BaseException, config: Config) -> None:
    """Note in the run's events why it failed, and write its report without a word: what it failed of comes first."""
    if isinstance(error, StoppedEarly | KeyboardInterrupt):
        telling.tell({"step": step, "event": "stop"})
        return
    said = (error.problem if isinstance(error, BigtrainError) else str(error)).partition("\n")[0]
    telling.tell({"step": step, "event": "failure", "text": f"{type(error).__name__}: {said}"})
    if telling.console is not None and config.track.report:
        with suppress(Exception):
            write_report(folder.path)


def _gpus(world: World) -> list[str]:
    if world.device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _derived(trackers: Sequence[Tracker], training: Training, console: Console) -> Sequence[Tracker]:
    """The trackers, with what follows from the throughput: tokens a second, and utilisation where it can be told."""
    tokens = _tokens_per_sample(training.config)
    share: Utilisation | None = None
    if training.world.device.type == "cuda":
        found = utilisation_of(training, torch.cuda.get_device_name(training.world.device))
        if isinstance(found, str):
            console.say(f"no mfu: {found}")
        else:
            share = found
    return [Derived(trackers, share, tokens)] if share or tokens else trackers


def _tokens_per_sample(config: Config) -> int | None:
    tokens = config.data.args.get("context") if config.task.name == "causal_lm" else None
    return tokens if isinstance(tokens, int) else None


def utilisation_of(training: Training, device_name: str) -> Utilisation | str:
    """How to compute a training's utilisation of its GPUs, or why it cannot be."""
    config = training.config
    if training.when_closed:
        return "the head trains alone, on features that were computed before"
    ours, theirs = config.data.args.get("context"), config.model.args.get("context")
    if None not in (ours, theirs) and ours != theirs:
        return f"the model says what {theirs} tokens cost (model.args.context), and samples have {ours}"
    dtype = COMPUTE_DTYPES.get(config.precision, DTYPES[config.precision])
    return utilisation(training.model, device_name, dtype, training.world.size)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _is_small(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() <= _LARGEST_IN_RESULT


def _first_lines(training: Training) -> str:
    config, world = training.config, training.world
    parameters = sum(piece[0] for piece in training.sizes)
    trained = sum(piece[0] for piece in training.sizes if piece[1])
    share = "" if trained == parameters else f", {trained:,} of them trained"
    return (
        f"{config.run.name}: {config.model.name} ({parameters:,} parameters{share}) on {config.data.name} "
        f"({training.train.num_samples:,} samples), {training.cadence.total_steps} steps of {config.data.batch_size}\n"
        f"{training.engine_choice}, {world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    )
