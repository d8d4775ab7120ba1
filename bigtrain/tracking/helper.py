"""The process that trackers live in: `python -m bigtrain.tracking.helper`, started by `outside`.

Lines of JSON come in: the trackers to make, then rows, then the word to close. What the user should know goes out in
lines of JSON. Each tracker has a thread and a bounded queue: one that hangs or fails holds up no other. Rows are taken
ten times a second: to wake a process with each would cost the training more than to write it. This process does not
import torch.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from bigtrain.errors import UserError
from bigtrain.metrics import from_json
from bigtrain.named import call, load
from bigtrain.tracking.base import TrackedRun, Tracker

_MOST_WAITING = 20_000
# How long trackers may take to close: where the training asks for it, and where it has been killed, so that nothing is
# left of a run that somebody ended.
_SECONDS_TO_CLOSE, _SECONDS_LEFT_ALONE = 25.0, 3.0
_SECONDS_BETWEEN, _MUCH = 0.1, 32_768  # between two fetches; bytes, after which there are more at once


class Working:
    """A tracker at work in a thread.

    Args:
        name: What the user calls it.
        make: Makes it; may take long, and may fail.
        warn: Tells the user that rows do not reach the tracker.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._is_dead = self._is_late = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def take(self, row: Mapping[str, Any]) -> None:
        """Put a row where the thread finds it."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            if not (self._is_late or self._is_dead):
                self._is_late = True
                self._warn(f"warning: {self.name} cannot keep up, and rows are left out")

    def close(self) -> None:
        """Let the thread end when it has taken everything."""
        try:
            self._rows.put(None, timeout=1)
        except queue.Full:
            self._is_dead = True

    def ended(self, seconds: float) -> bool:
        """Whether the thread has ended, after waiting so long at most."""
        self._thread.join(max(seconds, 0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            tracker = self._make()
            try:
                while (row := self._rows.get()) is not None:
                    tracker.log(row)
            except BaseException:
                with suppress(BaseException):  # what it has may be saved all the same
                    tracker.close()
                raise
            tracker.close()
        except BaseException as error:  # a library may even raise SystemExit
            self._is_dead = True
            said = (error.problem if isinstance(error, UserError) else str(error)).strip().partition("\n")[0]
            self._warn(f"warning: {self.name} stopped: {type(error).__name__}: {said}; training goes on")


def make_tracker(factory: str, args: Mapping[str, Any], run: TrackedRun, say: Callable[[str], None]) -> Tracker:
    """Make a tracker of `package.module:Class`; it is given `run` and `say` where it takes them."""
    cls = load(factory, error=UserError, where="track.trackers")
    parameters = inspect.signature(cls).parameters
    known = {"run": run, "say": say}
    given = {name: value for name, value in known.items() if name in parameters and name not in args}
    made: Tracker = call(cls, {**args, **given}, name=factory, error=UserError, where="track.trackers")
    return made


def fetch(pipe: int) -> Iterator[bytes]:
    """The lines that come out of a pipe; one that a kill has cut off is not told."""
    begun = b""
    while part := os.read(pipe, 1 << 20):
        *lines, begun = (begun + part).split(b"\n")
        yield from lines
        if len(part) < _MUCH:
            time.sleep(_SECONDS_BETWEEN)


def work(lines: Iterator[bytes], tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Serve trackers until the lines end or the word to close comes."""
    first = json.loads(next(lines, b"{}"))
    if not first:
        return
    run = TrackedRun(**first["run"])

    def say(text: str) -> None:
        tell({"say": text})

    def warn(text: str) -> None:
        tell({"lost": text})

    def making(spec: Mapping[str, Any]) -> Callable[[], Tracker]:
        return lambda: make_tracker(spec["factory"], spec["args"], run, say)

    trackers = [Working(spec["name"], making(spec), warn) for spec in first["trackers"]]
    seconds = _SECONDS_LEFT_ALONE
    for line in lines:
        row = from_json(json.loads(line))
        if row.get("close"):
            seconds = _SECONDS_TO_CLOSE
            break
        for tracker in trackers:
            tracker.take(row)
    for tracker in trackers:
        tracker.close()
    until = time.monotonic() + seconds
    for tracker in trackers:
        if not tracker.ended(until - time.monotonic()):
            warn(f"warning: {tracker.name} did not take everything in time")
    tell({"done": True})


def main() -> None:
    """Take lines from the pipe; leave it, and the one that answers, to nobody else."""
    # Woken by a row, it must not take the processor from the training, nor must what it starts.
    os.nice(10)
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process; this one ends with its rank
    lines = fetch(os.dup(0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # whatever is started here must not hold the pipes open,
    os.dup2(2, 1)  # and what libraries print goes to the log
    lock = threading.Lock()

    def tell(message: Mapping[str, Any]) -> None:
        with lock:
            try:
                answers.write(json.dumps(message).encode() + b"\n")
            except OSError:  # nobody listens any more
                print(message, file=sys.stderr)

    work(lines, tell)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not waiting for threads that hang


if __name__ == "__main__":
    main()
