"""Why ranks failed: each leaves word in its attempt's folder for the launcher. It does not import torch."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import PASSING, BigtrainError
from bigtrain.runs import read_json, write_atomically


@dataclass(frozen=True, slots=True)
class RankFailure:
    """How one rank failed.

    Attributes:
        rank: Which one.
        step: The number of steps it had taken; None before the first.
        type: The exception's class.
        message: What it said.
        where: The place it named, if any.
        remedy: What it said can be done, if anything.
        exit_code: What the rank exits with.
        traceback: The traceback, formatted.
        time: When, in seconds since 1970; the first to fail is most often the cause of the others.
        may_pass: Whether another start may go well: the network or the disk failed it, say, and not its own code.
    """

    rank: int
    step: int | None
    type: str
    message: str
    where: str | None
    remedy: str | None
    exit_code: int
    traceback: str
    time: float
    may_pass: bool = False


def write_error(attempt: str | Path, rank: int, step: int | None, error: BaseException) -> Path | None:
    """Leave word of why a rank failed, for the launcher; the first word of a rank stays.

    Returns:
        The file, or None where it cannot be written: the error itself must reach the user all the same.
    """
    ours = error if isinstance(error, BigtrainError) else None
    failure = RankFailure(
        rank=rank,
        step=step,
        type=type(error).__name__,
        message=ours.problem if ours else str(error),
        where=ours.where if ours else None,
        remedy=ours.remedy if ours else None,
        exit_code=ours.exit_code if ours else 1,
        traceback="".join(traceback.format_exception(error)),
        time=time.time(),
        may_pass=_may_pass(error, step),
    )
    path = Path(attempt, "errors", f"rank-{rank:05d}.json")
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_atomically(path, json.dumps(asdict(failure), indent=2) + "\n")
    except OSError:
        return None
    return path


def _may_pass(error: BaseException, step: int | None) -> bool:
    if isinstance(error, BigtrainError):
        return isinstance(error, PASSING)
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))
    # Before the first step a RuntimeError is a shape that does not fit; after it, most often a library's collective.
    is_own_fault = isinstance(error, (NotImplementedError, RecursionError))
    return step is not None and isinstance(error, RuntimeError) and not is_own_fault


def read_errors(attempt: str | Path) -> list[RankFailure]:
    """How ranks failed in an attempt, the first one first."""
    files = sorted(Path(attempt, "errors").glob("rank-*.json"))
    failures = [failure for file in files if (failure := _failure(read_json(file)))]
    return sorted(failures, key=lambda failure: failure.time)


def _failure(held: Mapping[str, Any]) -> RankFailure | None:
    """What a rank left; None where the file is damaged."""
    try:
        failure = RankFailure(**held)
        return failure if isinstance(failure.rank, int) and isinstance(failure.time, float) else None
    except TypeError:  # other fields
        return None
