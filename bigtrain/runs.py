"""The run folder: what lies where, who may make it, and how a run that is finished or has failed is read.

    <dir>/<name>/
      config.yaml                the resolved run file; with it the run has begun
      attempts/<n>/logs/         what each rank printed, where a launcher started them
      attempts/<n>/errors/       one JSON file for each rank that failed
      metrics.jsonl              one JSON object a line
      result.json                written last: with it the run is finished

A folder is claimed by making its first attempt, which only one process can do. A launcher claims it before
its ranks start, for their logs, and tells them by BIGTRAIN_ATTEMPT_DIR; without a launcher rank 0 claims
it. Either way nothing else is written before everything about the run has been checked. This module does
not import torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError, RunFolderError

ATTEMPT_VARIABLE = "BIGTRAIN_ATTEMPT_DIR"

_CONFIG, _RESULT, _METRICS, _ATTEMPTS = "config.yaml", "result.json", "metrics.jsonl", "attempts"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run that has begun.

    Attributes:
        path: The folder.
        attempt: The part of it that belongs to this start of the run.
    """

    path: Path
    attempt: Path

    @classmethod
    def create(cls, folder: str | Path, name: str, config_yaml: str) -> RunFolder:
        """Begin a run, in the attempt that the launcher made or in one of its own. Only rank 0 may call it.

        Args:
            folder: The folder of all runs.
            name: The run's name.
            config_yaml: The resolved run file.

        Raises:
            RunFolderError: Where the folder is not free, or cannot be made.
        """
        check_free(folder, name)
        path = Path(folder, name)
        attempt = _attempt_of_launcher(path) or claim(folder, name)
        try:
            write_atomically(path / _CONFIG, config_yaml)
        except OSError as error:
            raise _cannot("write to", path, error) from error
        return cls(path, attempt)

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / _CONFIG

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the numbers of the run."""
        return self.path / _METRICS

    @property
    def result(self) -> Path:
        """What the finished run came to."""
        return self.path / _RESULT

    @property
    def logs(self) -> Path:
        """What each rank of this attempt printed, where a launcher started them."""
        return self.attempt / "logs"

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, with what it came to: plain numbers, text, lists and mappings."""
        write_atomically(self.result, json.dumps(to_json(result), indent=2, allow_nan=False) + "\n")


def check_free(folder: str | Path, name: str) -> None:
    """See whether a run of this name may begin; nothing is written. Only rank 0 and launchers may call it.

    Raises:
        RunFolderError: Where the folder holds a finished run, an unfinished one, or something else, or
            where it cannot be made.
    """
    path = Path(folder, name)
    if not path.is_dir():
        _check_can_be_made(path)
        return
    held = sorted(entry.name for entry in path.iterdir())
    if _RESULT in held:
        raise _taken(path, f"the run {name} is finished: {_summary(path)}")
    if _CONFIG in held:
        raise _taken(path, f"the run {name} has begun and not finished, and resuming is not available yet")
    if held and _ATTEMPTS not in held:
        raise _taken(path, f"{path} is not the folder of a run: it holds {', '.join(held[:5])}")
    if held and _attempt_of_launcher(path) is None:
        raise _taken(path, f"the run {name} is being started by another process, or its start was broken off")


def claim(folder: str | Path, name: str) -> Path:
    """Make the folder of a run and its first attempt, with a place for logs, and return the attempt's path.

    A launcher calls it after `check_free` and hands the path to its ranks in BIGTRAIN_ATTEMPT_DIR.

    Raises:
        RunFolderError: Where another process was faster, or the folder cannot be made.
    """
    path = Path(folder, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / _ATTEMPTS).mkdir()  # of several processes one succeeds
        attempt = path / _ATTEMPTS / "0"
        (attempt / "logs").mkdir(parents=True)
    except FileExistsError:
        raise _taken(path, f"the run {name} is being started by another process") from None
    except OSError as error:
        raise _cannot("make", path, error) from error
    return attempt.absolute()


def release(attempt: Path) -> None:
    """Take away the attempt of a run that a user's error kept from beginning: its name is free again."""
    path = attempt.parent.parent
    if (path / _CONFIG).exists():
        return
    shutil.rmtree(attempt)
    attempt.parent.rmdir()
    if not any(path.iterdir()):
        path.rmdir()


def _attempt_of_launcher(path: Path) -> Path | None:
    """The attempt in this folder that a launcher made for this process; one of another run does not count."""
    given = os.environ.get(ATTEMPT_VARIABLE)
    if not given:
        return None
    attempt = Path(given)
    return attempt if attempt.is_dir() and attempt.parent.parent.resolve() == path.resolve() else None


def _check_can_be_made(path: Path) -> None:
    there = path
    while not there.exists():
        if there.is_symlink():
            raise RunFolderError(f"{there} is a link to nothing", remedy="take the link away, or set run.dir")
        there = there.parent
    if not there.is_dir():
        raise RunFolderError(f"{there} is a file, not a folder", remedy="set run.dir or run.name to another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"no permission to write in {there}", remedy="set run.dir to a folder of your own")


def _taken(path: Path, problem: str) -> RunFolderError:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    remedy = f"train under another name, as with run.name={path.name}-{number}, or delete the folder {path}"
    return RunFolderError(problem, where=str(path), remedy=remedy)


def _cannot(verb: str, path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"cannot {verb} {path}: {error.strerror}", remedy="set run.dir to a folder of your own")


def _summary(path: Path) -> str:
    """The first few numbers of a result."""
    result = _read_json(path / _RESULT)
    held = {"steps": result.get("steps"), **result.get("metrics", {})}
    numbers = [f"{key} {value:.6g}" for key, value in held.items() if isinstance(value, int | float)]
    return ", ".join(numbers[:6]) or "its result holds no numbers"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(value: Any) -> Any:
    """The same value with words for the numbers that JSON does not know: nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off in the middle is left out.

    Raises:
        RunFolderError: Where there is no such file, or a line before the last is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise RunFolderError(f"there is no file {path}", remedy="give a run's metrics.jsonl")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [from_json(json.loads(line))] if line else []
        except ValueError:
            if number == len(lines):
                break
            raise RunFolderError(f"the line is damaged: {line[:60]!r}", where=f"{path}:{number}") from None
    return rows


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
    )
    path = Path(attempt, "errors", f"rank-{rank:05d}.json")
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_atomically(path, json.dumps(asdict(failure), indent=2) + "\n")
    except OSError:
        return None
    return path


def read_errors(attempt: str | Path) -> list[RankFailure]:
    """How ranks failed in an attempt, the first one first."""
    files = sorted(Path(attempt, "errors").glob("rank-*.json"))
    failures = [RankFailure(**failure) for file in files if (failure := _read_json(file))]
    return sorted(failures, key=lambda failure: failure.time)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
