"""The run folder: what lies where, who may make it, and how a run that is finished or has failed is read.

    <dir>/<name>/
      config.yaml                the resolved run file of the newest start; with it the run has begun
      stop                       the number of the start that is to save and leave
      lease                      which start owns the run, and whether it lives (lease.py)
      attempts/<n>/logs/         what each rank printed in that start, where a launcher started them
      attempts/<n>/errors/       one JSON file for each rank that failed
      metrics.jsonl              one JSON object a line
      checkpoints/               the training state
      result.json                written last: with it the run is finished

The folder is the same for every start of a run. A start claims it by making the next attempt's folder, which only one
process can do, and holds its lease. A launcher claims it before its ranks start, for their logs, and tells them by
BIGTRAIN_ATTEMPT_DIR; without a launcher rank 0 claims it. Either way nothing else is written before everything about
the run has been checked. This module does not import torch.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import lease
from bigtrain.errors import RunFolderError, TrainingError
from bigtrain.metrics import to_json
from bigtrain.named import nearest

ATTEMPT_VARIABLE = "BIGTRAIN_ATTEMPT_DIR"
# What a start is part of, as a cluster's job; a later start of the same owner takes the run over without waiting.
OWNER_VARIABLE = "BIGTRAIN_OWNER"

CONFIG, RESULT, _METRICS, _ATTEMPTS, _STOP = "config.yaml", "result.json", "metrics.jsonl", "attempts", "stop"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may lie in a folder in which a run starts.

    Attributes:
        unfinished: A run that has begun and not finished: it goes on.
        finished: A run that is finished: it goes on too, being asked for more than it has done.
    """

    unfinished: bool = False
    finished: bool = False


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
    def create(cls, folder: str | Path, name: str, config_yaml: str, allowed: Allowed = Allowed()) -> RunFolder:
        """Begin a run or go on with one, in the attempt that the launcher made or in one of its own.

        Only rank 0 may call it.

        Args:
            folder: The folder of all runs.
            name: The run's name.
            config_yaml: The resolved run file.
            allowed: What may lie in the folder already.

        Raises:
            RunFolderError: Where the folder is not free, or cannot be made.
        """
        check_free(folder, name, allowed)
        path = Path(folder, name)
        attempt = (given := attempt_of_launcher(path)) or claim(folder, name)
        earlier = attempt / f"earlier-{RESULT}"
        try:
            if (path / RESULT).exists():  # the run goes on: what it had come to belongs to its past
                os.replace(path / RESULT, earlier)
            write_atomically(path / CONFIG, config_yaml)
        except OSError as error:
            with suppress(OSError):  # it had none
                os.replace(earlier, path / RESULT)
            (give_back if given else release)(attempt)  # a notebook's process may try again
            raise _cannot("write to", path, error) from error
        return cls(path, attempt)

    @property
    def number(self) -> int:
        """Which start of the run this is, from 0."""
        return int(self.attempt.name)

    @property
    def checkpoints(self) -> Path:
        """Where the training state is kept."""
        return checkpoints_of(self.path)

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the numbers of the run."""
        return self.path / _METRICS

    @property
    def result(self) -> Path:
        """What the finished run came to."""
        return self.path / RESULT

    @property
    def logs(self) -> Path:
        """What each rank of this attempt printed, where a launcher started them."""
        return self.attempt / "logs"

    def is_to_stop(self) -> bool:
        """Whether somebody wishes this start of the run to save and leave."""
        try:
            return (self.path / _STOP).read_text().strip() == self.attempt.name
        except OSError:
            return False

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, with what it came to: plain numbers, text, lists and mappings.

        Raises:
            TrainingError: Where the disk refuses that.
        """
        try:
            write_atomically(self.result, json.dumps(to_json(result), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainingError(
                f"the run has come to its end, and cannot be marked as finished: {error.strerror}",
                where=str(self.result),
                remedy="free some space, or make it writable; the same command with checkpoint.resume=auto, the "
                "default, then ends it, from its last checkpoint",
            ) from error


def check_free(folder: str | Path, name: str, allowed: Allowed = Allowed()) -> None:
    """See whether a run of this name may start; nothing is written. Only rank 0 and launchers may call it.

    Args:
        folder: The folder of all runs.
        name: The run's name.
        allowed: What may lie in the folder already.

    Raises:
        RunFolderError: Where the folder holds a finished run, a live or an unfinished one, or something else, or
            where it cannot be made.
    """
    path = Path(folder, name)
    if not path.is_dir():
        _check_can_be_made(path)
        return
    held = sorted(entry.name for entry in path.iterdir())
    if attempt_of_launcher(path) is None:
        _check_not_live(path)
    if RESULT in held and not allowed.finished:
        is_early = read_json(path / RESULT).get("stopped_early")
        more = "give eval.early_stop more patience" if is_early else "raise train.steps or train.epochs"
        way_on = f"{more} to go on" if allowed.unfinished else f"set checkpoint.resume=auto to go on, and {more}"
        raise _taken(path, f"the run {name} is finished: {_summary(path)}", way_on)
    # Also without its config.yaml: a new run's checkpoints must not mix with those that are there, or were brought in.
    is_alone = held == ["checkpoints"] and any(path.glob("checkpoints/step-*/manifest.json"))
    has_begun = CONFIG in held or is_alone or (_ATTEMPTS in held and any(checkpoints_of(path).glob("*")))
    if has_begun and not allowed.unfinished:
        raise _taken(path, f"the run {name} has begun and not finished", "set checkpoint.resume=auto to go on")
    if has_begun:
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunFolderError(f"no permission to write in {path}", remedy="set run.dir to a folder of your own")
    elif held and _ATTEMPTS not in held:
        raise _taken(path, f"{path} is not the folder of a run: it holds {', '.join(held[:5])}")


def _check_not_live(path: Path) -> None:
    holder = lease.live_holder(path, os.environ.get(OWNER_VARIABLE))
    if holder:
        raise RunFolderError(
            f"the run {path.name} is in use by {holder}",
            where=str(path),
            remedy=f"wait for it or stop it; or train under another name, as with {_free_name(path)}",
        )


def claim(folder: str | Path, name: str) -> Path:
    """Make the next attempt of a run, with a place for logs, take the run's lease, and return the attempt's path.

    A launcher calls it after `check_free`, hands the path to its ranks in BIGTRAIN_ATTEMPT_DIR, and gives the run back
    with `give_back` when they have ended.

    Raises:
        RunFolderError: Where another process was faster, or the folder cannot be made.
    """
    path = Path(folder, name)
    made = [path, path / _ATTEMPTS]
    try:
        (path / _ATTEMPTS).mkdir(parents=True, exist_ok=True)
        number = max((int(earlier.name) + 1 for earlier in attempts(path)), default=0)
        if number:
            lease.await_claim(path, number - 1)
            _check_not_live(path)
        attempt = path / _ATTEMPTS / str(number)
        attempt.mkdir()  # of several processes one succeeds
        made += [attempt, attempt / "logs"]
        (attempt / "logs").mkdir()
        lease.take(path, number, os.environ.get(OWNER_VARIABLE))
    except FileExistsError:
        raise _taken(path, f"the run {name} is being started by another process") from None
    except OSError as error:
        for empty in reversed(made):
            with suppress(OSError):  # it holds something, or is not there
                empty.rmdir()
        raise _cannot("make", path, error) from error
    return attempt.absolute()


def attempts(path: Path) -> list[Path]:
    """The attempts of a run, the first one first."""
    found = [entry for entry in (path / _ATTEMPTS).glob("*") if entry.name.isdecimal()]
    return sorted(found, key=lambda entry: int(entry.name))


def checkpoints_of(path: Path) -> Path:
    """Where a run keeps its training state."""
    return path / "checkpoints"


def newest_step(path: Path) -> int:
    """The step of a run's newest committed checkpoint; -1 where there is none."""
    names = [file.parent.name.removeprefix("step-") for file in checkpoints_of(path).glob("step-*/manifest.json")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def by_name(place: str | Path, folder: str | Path = "runs") -> Path:
    """A path as it stands, or, where nothing is there, the run of that name in the folder of all runs."""
    path, named = Path(place), Path(folder, place)
    return named if not path.exists() and named.is_dir() else path


def run_at(place: str | Path, folder: str | Path = "runs") -> Path:
    """Where a run should be that is named so: at a path of several parts, or in the folder of all runs."""
    path = Path(place)
    return path if len(path.parts) > 1 else Path(folder, path)


def names_of(folder: Path) -> list[str]:
    """The runs in a folder of runs, by name."""
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir() if is_run(path))
    return []


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any((folder / name).exists() for name in (CONFIG, _METRICS, _ATTEMPTS))


def instead_of(path: Path, *otherwise: str) -> str:
    """A remedy where no run is at a path: the nearest names of those beside it, or a few of them.

    Args:
        path: Where one should be.
        otherwise: The remedy where there are none; a second one is said in any case.
    """
    known = names_of(path.parent)
    near = nearest(path.name, known)
    listed = f"runs in {path.parent}: {', '.join(known[:10])}{', …' if len(known) > 10 else ''}" if known else ""
    named = f"did you mean {' or '.join(near)}?" if near else listed
    return "\n".join(filter(None, (named or otherwise[0], *otherwise[1:])))


def wish_to_stop(path: Path, attempt: int) -> None:
    """Leave word that a start of a run is to save and leave; later starts are not meant."""
    write_atomically(path / _STOP, f"{attempt}\n")


def take(attempt: Path) -> bool:
    """Start in an attempt that was made when the run was submitted; False where it has been used, or is not the newest.

    Raises:
        RunFolderError: Where another start of the run is alive.
    """
    path = attempt.parent.parent
    if not attempt.is_dir() or (attempt / "start.json").exists() or attempts(path)[-1].name != attempt.name:
        return False
    _check_not_live(path)
    (attempt / "logs").mkdir(exist_ok=True)
    lease.take(path, int(attempt.name), os.environ.get(OWNER_VARIABLE))
    return True


def give_back(attempt: Path) -> None:
    """Let the next start have the run, as this one has ended."""
    lease.drop(attempt.parent.parent, int(attempt.name))


def release(attempt: Path) -> None:
    """Take away the attempt of a run that a user's error kept from beginning: its name is free again.

    Of a run that had begun the attempt stays: how this start went wrong is to be read.
    """
    path = attempt.parent.parent
    give_back(attempt)
    if (path / CONFIG).exists():
        return
    shutil.rmtree(attempt)
    with suppress(OSError):  # another attempt, or something else, is there
        attempt.parent.rmdir()
        (path / lease.LEASE).unlink()
        path.rmdir()


def attempt_of_launcher(path: Path) -> Path | None:
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


def _taken(path: Path, problem: str, way_on: str = "") -> RunFolderError:
    remedy = f"train under another name, as with {_free_name(path)}, or delete the folder {path}"
    return RunFolderError(problem, where=str(path), remedy=f"{way_on};\nor {remedy}" if way_on else remedy)


def _free_name(path: Path) -> str:
    """A change that names the run otherwise, as a shell takes it."""
    names = (f"{path.name}-{number}" for number in itertools.count(2))
    return shlex.quote("run.name=" + next(name for name in names if not path.with_name(name).exists()))


def _cannot(verb: str, path: Path, error: OSError) -> RunFolderError:
    remedy = "set run.dir to a folder that you may write to, with room for it"
    return RunFolderError(f"cannot {verb} {path}: {error.strerror}", remedy=remedy)


def _summary(path: Path) -> str:
    """The first few numbers of a result."""
    result = read_json(path / RESULT)
    held = {"steps": result.get("steps"), **result.get("metrics", {})}
    numbers = [f"{key} {value:.6g}" for key, value in held.items() if isinstance(value, int | float)]
    return ", ".join(numbers[:6]) or "its result holds no numbers"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write says no name
        raise
    finally:
        with suppress(OSError):  # where it could not be made
            aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
