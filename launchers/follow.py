"""How a run stands, and what its ranks print while they do: read from the run folder, and asked of the scheduler."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import lease
from bigtrain.errors import RunFolderError
from bigtrain.runs import attempts, read_json, wish_to_stop
from launchers.queue import JobState, job_of, state_of
from launchers.steps import ask
from launchers.supervise import FINISHED

RUNNING, WAITING, BROKEN_OFF, NOT_BEGUN = "running", "waiting", "broken off", "not begun"

_LOOK_S = 0.5
_TAIL_BYTES = 1 << 16
_ENDING_SIGNALS = 3  # a launcher ends its ranks at the third


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        state: running, waiting, finished, stopped, failed, hung, refused, again, broken off, or not begun.
        where: The job, or the machine and process; why it waits.
        since: When that began, in seconds since 1970.
        step: The last step that was logged.
        loss: Its loss.
        cause: Why it ended badly, in a line.
        code: What the launcher ended with.
    """

    state: str
    where: str
    since: float
    step: int | None
    loss: float | None
    cause: str | None = None
    code: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.state not in (RUNNING, WAITING)


def standing(path: Path) -> Standing:
    """How a run stands.

    Args:
        path: The run folder.
    """
    all_of_them = attempts(path)
    started = [attempt for attempt in all_of_them if (attempt / "start.json").exists()]
    start = read_json(started[-1] / "start.json") if started else {}
    end = read_json(started[-1] / "end.json") if started else {}
    last = _last_row(path / "metrics.jsonl", lambda row: "loss" in row)
    step, loss = (last.get("step"), _number(last["loss"], float("nan"))) if last else (None, None)
    job = job_of(path)
    queued = state_of(job) if job else None
    where = f"job {job}" if job else _place(start)
    if queued is not None:
        state = WAITING if queued.is_waiting else RUNNING
        where = f"job {queued.number}" + (f": {queued.reason}" if queued.reason else "")
        return Standing(state, where, _changed(queued, start, path), step, loss)
    holder = lease.live_holder(path)
    is_alone = len(all_of_them) > len(started) and has_no_launcher(all_of_them[-1])
    if holder is not None and is_alone:
        return _of_one_process(path, step, loss, holder)
    if holder is not None or _is_alive(start):
        return Standing(RUNNING, where or holder or "", start.get("time", 0.0), step, loss)
    if (path / "result.json").exists():
        return Standing(FINISHED, where, (path / "result.json").stat().st_mtime, step, loss)
    if is_alone:
        return _of_one_process(path, step, loss)
    if end:
        return Standing(end["outcome"], where, end["time"], step, loss, end.get("cause"), end["code"])
    if not started:
        return Standing(NOT_BEGUN, where, path.stat().st_mtime, step, loss, code=1)
    return Standing(BROKEN_OFF, where, start.get("time", 0.0), step, loss, "its launcher was killed", 1)


def has_no_launcher(attempt: Path) -> bool:
    """Whether a start of which nobody noted how it began is one of `bigtrain train`, and not a job that never began."""
    return (attempt / "logs").is_dir() and not (attempt / "submit").is_dir()


def _place(start: dict[str, Any]) -> str:
    return f"{start['host']}, process {start['pid']}" if {"host", "pid"} <= start.keys() else ""


def _is_alive(start: dict[str, Any]) -> bool:
    """Whether the launcher of an attempt is a live process of this machine, and not one that reused its number."""
    if start.get("host") != socket.gethostname() or "pid" not in start:
        return False
    try:
        words = Path(f"/proc/{start['pid']}/cmdline").read_bytes()
    except OSError:
        return False
    return b"bigtrain" in words or b"submitit" in words


def _changed(job: JobState, start: dict[str, Any], path: Path) -> float:
    return float(path.stat().st_mtime if job.is_waiting else start.get("time", path.stat().st_mtime))


def _of_one_process(path: Path, step: int | None, loss: float | None, holder: str | None = None) -> Standing:
    """How a start without a launcher stands, by who holds the run, or how it ended, by what it said last."""
    said = _last_row(path / "metrics.jsonl", lambda row: row.get("event") in ("start", "stop", "failure")) or {}
    since = _number(said.get("time"), path.stat().st_mtime)
    if holder is not None:
        return Standing(RUNNING, holder, since, step, loss)
    if said.get("event") == "failure":
        return Standing("failed", "", since, step, loss, str(said.get("text")), 1)
    if said.get("event") == "stop":
        return Standing("stopped", "", since, step, loss)
    return Standing(
        BROKEN_OFF, "", since, step, loss, "it ended without a word: its process was killed, or the disk was full", 1
    )


def _number(value: Any, otherwise: float) -> float:
    """A number of a row, which may be damaged: a list of runs is made all the same."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return otherwise


def _last_row(metrics: Path, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The last line of numbers or events for which that holds, as far as is looked back."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and is_it(row):
                return row
    return None


# ---- logs ----------


def logs_of(attempt: Path, rank: int) -> list[Path]:
    """The files that hold what a rank of an attempt printed; those of its machine where ranks share one."""
    own = [attempt / "logs" / f"rank-{rank:05d}.{stream}" for stream in ("stdout", "stderr")]
    shared = sorted((attempt / "logs").glob("node-*.log"))
    return [path for path in own if path.exists()] or shared


def print_logs(path: Path, say: Callable[[str], None], *, rank: int = 0) -> None:
    """Print what a rank has printed in the newest attempt, and why that ended, if it did.

    Raises:
        RunFolderError: Where the run has no such rank.
    """
    _check_rank(path, rank)
    tail = _Tail(say, rank)
    tail.move_on(path)
    found = standing(path)
    if found.state == WAITING:
        say(f"waiting in the queue: {found.where}")
    elif found.state == NOT_BEGUN:
        say(f"{path} has not begun: nothing has been printed yet")


def follow(path: Path, say: Callable[[str], None], *, job: str | None = None, rank: int = 0) -> int:
    """Print what a rank prints, over restarts and requeues, until the run is over; Ctrl-C ends only the following.

    Args:
        path: The run folder.
        say: Takes each line.
        job: The job it was submitted as.
        rank: Which one.

    Returns:
        What its launcher ended with.

    Raises:
        RunFolderError: Where the run has no such rank.
    """
    _check_rank(path, rank)
    tail, told = _Tail(say, rank), ""
    try:
        while True:
            tail.move_on(path)
            found = standing(path)
            if found.state == WAITING and found.where != told:
                say(f"waiting in the queue: {found.where}")
            told = found.where if found.state == WAITING else ""
            if found.is_over:
                tail.move_on(path)
                say(f"{path.name}: {found.state}" + (f" ({found.cause})" if found.cause else ""))
                return found.code
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        say(f"the run goes on without being followed: bigtrain runs logs {path.name} -f")
        return 0


def _check_rank(path: Path, rank: int) -> None:
    started = [start for attempt in attempts(path) if (start := read_json(attempt / "start.json"))]
    count = started[-1].get("processes") if started else None
    if count is not None and rank >= count:
        raise RunFolderError(
            f"the run {path.name} has no rank {rank}: it was started in {count} process{'es' if count > 1 else ''}",
            where="--rank",
            remedy=f"give a rank from 0 to {count - 1}",
        )


class _Tail:
    """Reads on in the logs of the newest attempt."""

    def __init__(self, say: Callable[[str], None], rank: int) -> None:
        self._say, self._rank = say, rank
        self._attempt: Path | None = None
        self._read: dict[Path, int] = {}

    def move_on(self, path: Path) -> None:
        started = [a for a in attempts(path) if (a / "start.json").exists() or logs_of(a, self._rank)]
        for attempt in started[-2:] if self._attempt else started[-1:]:
            if self._attempt is not None and int(attempt.name) < int(self._attempt.name):
                continue
            if attempt != self._attempt:
                self._finish()
                self._attempt = attempt
                if attempt.name != "0":
                    self._say(f"--- start {attempt.name}")
            self._print_new(attempt)

    def _print_new(self, attempt: Path) -> None:
        for file in logs_of(attempt, self._rank):
            data = b""
            with suppress(OSError), file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                data = stream.read()
            whole = data.rpartition(b"\n")[0]
            if whole:
                self._read[file] = self._read.get(file, 0) + len(whole) + 1
                for line in whole.decode(errors="replace").split("\n"):
                    self._print(line, file)

    def _print(self, line: str, file: Path) -> None:
        """Of a log that ranks share, this rank's lines only: each begins with its rank."""
        if file.name.startswith("node-"):
            rank, _, line = line.partition(":")
            if rank.strip() != str(self._rank):
                return
        self._say(line)

    def _finish(self) -> None:
        if self._attempt is not None:
            self._print_new(self._attempt)
            end = read_json(self._attempt / "end.json")
            if end.get("cause"):
                self._say(f"--- start {self._attempt.name} {end['outcome']}: {end['cause']}")


# ---- stopping ----------


def stop(path: Path, *, now: bool) -> str:
    """Have a run save and leave, or end it at once; returns what was done, in words."""
    found, job = standing(path), job_of(path)
    if found.is_over:
        return f"{path.name} does not run: it is {found.state}"
    if job is not None and (now or found.state == WAITING):
        ask("scancel", job)
        return f"job {job} is cancelled"
    if not now:
        wish_to_stop(path, int(attempts(path)[-1].name))
        return f"{path.name} will save and leave after its current step ({found.where})"
    start = read_json(attempts(path)[-1] / "start.json")
    if not _is_alive(start):
        return f"{path.name} runs elsewhere: {found.where}"
    for _ in range(_ENDING_SIGNALS):
        with suppress(ProcessLookupError):
            os.kill(start["pid"], signal.SIGINT)  # of others, two within a moment are one
        time.sleep(_LOOK_S)
    return f"{path.name} was ended at once"
