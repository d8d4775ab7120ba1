"""What the loop tells others and asks of them: how far a run has come, hooks, trackers, and who keeps its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bigtrain.engines.sums import StepResult
from bigtrain.errors import TrainingError
from bigtrain.goals import Standing
from bigtrain.protocols import Batch, LossSum, Task

MOST_EXAMPLES = 18


class StepInfo:
    """What a hook is told after a step. Reading `loss` or `grad_norm` waits for the device.

    Attributes:
        step: The number of steps taken; the one just completed is its last.
        epoch: The epoch it belonged to, from 0.
        num_samples: Samples of the global batch.
        samples_seen: Samples since the start of the run.
        lr: The rate of each optimizer group in this step.
        evaluation: The evaluation made after this step, if there was one.
        is_last: Whether the run, or a phase of its freeze plan, ends with this step.
        numbers: What is in the next line of numbers besides, by name.
    """

    def __init__(
        self, result: StepResult, step: int, epoch: int, num_samples: int, samples_seen: int, lr: list[float]
    ) -> None:
        self._result = result
        self.step = step
        self.epoch = epoch
        self.num_samples = num_samples
        self.samples_seen = samples_seen
        self.lr = lr
        self.evaluation: dict[str, Any] | None = None
        self.is_last = False
        self.stop_requested = False
        self.save_requested = False
        self.numbers: dict[str, float] = {}

    @property
    def loss(self) -> float:
        """The mean loss of the global batch."""
        return float(self._result.loss)

    @property
    def grad_norm(self) -> float:
        """The gradient's norm before clipping."""
        return float(self._result.norm)

    def stop(self) -> None:
        """Ask all ranks to stop at the next step boundary."""
        self.stop_requested = True

    def save(self) -> None:
        """Ask all ranks to save a checkpoint at the next step boundary."""
        self.save_requested = True

    def log(self, numbers: Mapping[str, float]) -> None:
        """Have numbers of one's own in the next line: in metrics.jsonl, W&B and TensorBoard. Those of rank 0 count.

        Args:
            numbers: By name, as `mine/entropy`: with a slash, and neither `train/` nor `eval/` before it.

        Raises:
            TrainingError: Where a name is another one, or what it names is no number.
        """
        for name, number in numbers.items():
            if "/" not in name or name.startswith(("train/", "eval/")):
                raise TrainingError(f"{name!r} may not be logged", remedy="give it a name of your own: mine/<name>")
            try:
                self.numbers[name] = float(number)
            except (TypeError, ValueError, RuntimeError) as error:
                problem = f"{name} is a {type(number).__name__}, which is no number"
                raise TrainingError(problem, remedy="log single numbers, as loss.item()") from error


@dataclass(frozen=True)
class Hook:
    """A function called after every `every`-th step, on every rank."""

    call: Callable[[StepInfo], None]
    every: int = 1


class Examples:
    """Sample predictions of an evaluation, where the task can show some: `examples(result, batch, most)`.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self._show = getattr(task, "examples", None)
        self.found: list[dict[str, Any]] = []

    def look(self, result: LossSum, batch: Batch) -> None:
        """Take some of a microbatch, as long as there are too few."""
        if self._show is not None and len(self.found) < MOST_EXAMPLES:
            self.found += self._show(result, batch, MOST_EXAMPLES - len(self.found))


class TrainBatch(Protocol):
    """What the loop needs to know of one step's data."""

    @property
    def microbatches(self) -> list[Batch]:
        """This rank's part."""

    @property
    def epoch(self) -> int:
        """Counted from 0."""

    @property
    def num_samples(self) -> int:
        """Of the global batch."""

    @property
    def end(self) -> tuple[int, int]:
        """Where the next step begins: the epoch, and how many of its samples have been consumed."""


@dataclass(frozen=True)
class Cadence:
    """When things happen; None is never.

    Attributes:
        total_steps: When the run is done.
        log_every: A line of numbers, in steps.
        eval_every_steps: An evaluation; there is always one at the end if there is data for it.
        eval_every_epochs: The same in epochs.
        phase_at: The phase of the next step, by the number of steps taken and the epoch; None where there is one alone.
    """

    total_steps: int
    log_every: int
    eval_every_steps: int | None = None
    eval_every_epochs: int | None = None
    phase_at: Callable[[int, int], int] | None = None


@dataclass
class Outcome:
    """How far a run has come; in the end, how it ended.

    Attributes:
        steps: Optimizer steps taken.
        samples: Samples seen.
        evaluation: The last evaluation.
        stopped: Whether it was asked to stop before its end.
        again: Whether it is to be started again then.
        num_skipped: Steps whose numbers were not finite.
        position: Where the next step begins in the data: the epoch, and how many of its samples have been consumed.
        standings: What has come of the run's goals, by name.
        is_done: Whether the run has come to its end: to its last step, or to an early one.
        recent: The losses of the last steps, with which the next ones are compared.
    """

    steps: int = 0
    samples: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict, repr=False)
    stopped: bool = False
    again: bool = False
    num_skipped: int = 0
    position: tuple[int, int] = (0, 0)
    standings: dict[str, Standing] = field(default_factory=dict)
    is_done: bool = False
    recent: list[float] = field(default_factory=list, repr=False)


class Saver(Protocol):
    """Keeps the state of the training on disk. Every rank makes the same calls."""

    def is_due(self, step: int) -> bool:
        """Whether the state after this step is to be saved, by the number of steps."""

    def is_late(self) -> bool:
        """Whether it is to be saved by the clock, on this rank's own opinion."""

    def save(self, outcome: Outcome) -> None:
        """Save the state as it is now; it may be written while the training goes on."""

    def wait_for_copy(self) -> None:
        """Wait until the state that is being saved is free to change, before the optimizer changes it."""

    def poll(self) -> None:
        """Hear of what has been written, once a step.

        Raises:
            SaveError: On all ranks, why it was not.
        """

    def commit(self, outcome: Outcome) -> None:
        """Save the state whatever is wanted, if it is not saved yet, and wait until it is on the disk.

        Raises:
            SaveError: On all ranks, why it was not.
        """

    def finish(self, outcome: Outcome) -> None:
        """Save the state at the end, if it is wanted and is not saved yet, and wait until it is on the disk."""

    def settle(self) -> None:
        """Wait for what is being written, and save nothing more."""


class SavesNothing:
    """A saver for runs that keep nothing."""

    def is_due(self, step: int) -> bool:
        """Never."""
        return False

    def is_late(self) -> bool:
        """Never."""
        return False

    def save(self, outcome: Outcome) -> None:
        """Save nothing."""

    def wait_for_copy(self) -> None:
        """Wait for nothing."""

    def poll(self) -> None:
        """Hear nothing."""

    def commit(self, outcome: Outcome) -> None:
        """Save nothing."""

    def finish(self, outcome: Outcome) -> None:
        """Save nothing."""

    def settle(self) -> None:
        """Wait for nothing."""
