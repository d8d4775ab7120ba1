"""The exceptions bigtrain raises on purpose.

    BigtrainError                    something a person can act on; shown without a traceback
    ├── UserError                    found before anything started; exit code 2
    │   ├── ConfigError              the run file or the command line (may hold several problems)
    │   ├── ModelError               a model cannot be found or built
    │   ├── DataError                data cannot be found, read, or does not fit the task
    │   ├── PatternError             a pattern that matches nothing, or a name matched twice
    │   ├── CombinationError         two choices that cannot work together
    │   ├── SetupError               the machine or the environment lacks something
    │   └── RunFolderError           a run folder is in use, finished, or not one of ours
    └── TrainingError                found while training; exit code 1
        ├── NonFiniteError           a loss or gradient norm that is not finite
        ├── SpikeError               the loss leaps again and again
        ├── OutOfMemoryError         the device or the host ran out of memory
        ├── StateError               a state does not fit the model or optimizer
        ├── FreezeError              what is frozen moved, or what trains did not
        ├── RankError                a rank of a launched run failed
        ├── DivergedError            ranks hold different copies of the same weights
        └── CheckpointError          a checkpoint cannot be written, found or read
            ├── SaveError            it was not written, and nothing was committed
            │   ├── DiskFullError    the disk has no room for it
            │   └── LeaseError       another attempt owns the run now
            ├── ReadError            an I/O error that stayed; says nothing about the checkpoint
            ├── CorruptError         a file is not what was written
            └── NoGoodError          there are checkpoints, and none that can be loaded

Every one carries what was wrong, where, and what to do about it. This module imports nothing of bigtrain and nothing
heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class BigtrainError(Exception):
    """An error that a person can act on.

    Args:
        problem: What was wrong, with the value that was wrong, in one sentence.
        where: The place: `file:line`, a key of the run file, a rank and step.
        remedy: What to do about it, in one sentence or a short list of lines.
    """

    exit_code = 1

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.problem]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.remedy:
            lines.append("  do: " + self.remedy.replace("\n", "\n      "))
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default, and errors cross process borders.
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(cls: type[BigtrainError], fields: dict[str, object]) -> BigtrainError:
    error = cls.__new__(cls)
    Exception.__init__(error, fields.get("problem", ""))
    error.__dict__.update(fields)
    return error


class UserError(BigtrainError):
    """Found before anything started: nothing was created or overwritten."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a run file.

    Attributes:
        text: What was wrong, with the value that was wrong.
        where: `file:line`, or `command line`.
        key: The dotted path of the key.
        suggestions: The nearest valid keys or values, best first.
        remedy: What to do.
    """

    text: str
    where: str | None = None
    key: str | None = None
    suggestions: tuple[str, ...] = ()
    remedy: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.text}" if self.where else self.text]
        if self.suggestions:
            lines.append("  did you mean: " + ", ".join(self.suggestions))
        if self.remedy:
            lines.append("  do: " + self.remedy.replace("\n", "\n      "))
        return "\n".join(lines)


class ConfigError(UserError):
    """The run file or the command line: every problem that was found, at once."""

    def __init__(self, problems: Sequence[Problem] | str, *, remedy: str | None = None) -> None:
        self.problems = (Problem(problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems), remedy=remedy)


class ModelError(UserError):
    """A model cannot be found or built."""


class DataError(UserError):
    """Data cannot be found or read, or does not fit the task."""


class PatternError(UserError):
    """A pattern that matches nothing, or a name that two patterns claim."""


class CombinationError(UserError):
    """Two choices that cannot work together."""


class SetupError(UserError):
    """The machine or the environment lacks something."""


class RunFolderError(UserError):
    """A run folder is in use, is finished, or is not one of ours."""


class TrainingError(BigtrainError):
    """Found while training."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm that is not finite; the weights are those of the step before."""


class SpikeError(TrainingError):
    """The loss leaps again and again, though the run went back and left out the batches."""


class OutOfMemoryError(TrainingError):
    """The device or the host ran out of memory."""


class StateError(TrainingError):
    """A state does not fit the model or the optimizer."""


class FreezeError(TrainingError):
    """What is frozen has moved, what trains has not, or ranks hold different copies of it."""


class RankError(TrainingError):
    """A rank of a launched run failed."""


class DivergedError(TrainingError):
    """Ranks hold different copies of what must be the same on all of them: a machine has computed wrongly."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, found or read."""


class SaveError(CheckpointError):
    """A checkpoint was not written; nothing was committed, and what was committed before is as it was."""


class DiskFullError(SaveError):
    """The disk has no room for a checkpoint."""


class LeaseError(SaveError):
    """Another attempt owns the run now, and this one must not commit."""


class ReadError(CheckpointError):
    """An I/O error that stayed after several tries; it says nothing about what the checkpoint holds."""


class CorruptError(CheckpointError):
    """A file of a checkpoint is not what was written: `where` names it."""


class NoGoodError(CheckpointError):
    """There are checkpoints, and none that can be loaded: every bad file is listed."""


PASSING = (RankError, DivergedError, ReadError)
"""Errors after which another start, from the last good checkpoint, may go well."""
