"""Trackers in a process of their own, fed through a pipe that nobody waits for.

W&B takes a third of a millisecond of Python for a row, and may hang, refuse or die. Beside the training it may do so:
the training process writes a line into a pipe, and where the pipe is full keeps it for later. When the training is
killed, the other process sees the pipe end, writes what it has, and leaves.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.metrics import first_of, to_line
from bigtrain.tracking.base import TrackedRun

# What waits for trackers that are slow or not there yet; what comes after that is left out, and said.
_MOST_WAITING = 20_000
# How often it is heard whether they have something to say, at most.
_SECONDS_BETWEEN = 0.5
# How long the end of a run may wait for trackers, and when the user is told that it does.
_SECONDS_TO_CLOSE, _SECONDS_TO_TELL = 28.0, 4.0
# What the pipe holds, where the system lets us say so (1 MiB is Linux's most without rights): a row of histograms is
# megabytes, and of what the pipe does not hold, only as much goes on with each row that follows.
_PIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Spec:
    """A tracker to be made in the other process.

    Attributes:
        name: What the user calls it.
        factory: `package.module:Class`; its argument `run`, if it takes one, is the `TrackedRun`.
        args: Its other arguments.
    """

    name: str
    factory: str
    args: Mapping[str, Any] = field(default_factory=dict)


class Outside:
    """A tracker that hands every row to others, in a process of their own.

    Args:
        specs: The trackers.
        run: What they may know.
        log: The file that what they print goes to.
        say: Tells the user, a line at a time.
        seconds_to_close: The most that the end of the run waits for them.
        has_all: Whether everything that was logged is in metrics.jsonl.
        what_is_left: A line on how to send what trackers keep on this disk, said in the end where they did not come to
            theirs.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        run: TrackedRun,
        log: Path,
        say: Callable[[str], None],
        seconds_to_close: float = _SECONDS_TO_CLOSE,
        has_all: Callable[[], bool] = lambda: True,
        what_is_left: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._say, self._seconds_to_close = say, seconds_to_close
        self._has_all, self._what_is_left = has_all, what_is_left
        self._has_lost = False
        self._told: set[str] = set()
        self._names = ", ".join(spec.name for spec in specs)
        self._waiting: deque[bytes] = deque()
        self._leaves_out = self._has_told_so = False
        self._heard, self._heard_at = b"", 0.0
        self._is_done = False
        first = {"trackers": [asdict(spec) for spec in specs], "run": asdict(run)}
        self._waiting.append(to_line(first))
        with log.open("ab") as output:
            # Its own session: what interrupts the training must not take the last numbers with it.
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-m", "bigtrain.tracking.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                env=_environment(),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):
                fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand a row over, or keep it until it can be."""
        self.add(row)
        self.flush()

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row until `flush`."""
        if self._process is None:
            return
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(to_line(row))
        else:
            self._leaves_out = True

    def flush(self) -> None:
        """Hand over the rows that were kept, as far as they are taken, and hear what there is to say."""
        self._pass_on()
        if self._leaves_out and not self._has_told_so:
            self._has_told_so = True
            self._warn(f"warning: {self._names} cannot keep up, and rows are left out")
        if (now := time.monotonic()) - self._heard_at > _SECONDS_BETWEEN:
            self._heard_at = now
            self._listen()

    def close(self) -> None:
        """Wait until everything has been taken, but not for long."""
        if self._process is not None:
            self._close()
        left = self._what_is_left() if self._has_lost else None
        if left is not None and left not in self._told:
            self._say(left)

    def _close(self) -> None:
        self._waiting.append(to_line({"close": True}))
        until, told_at = time.monotonic() + self._seconds_to_close, time.monotonic() + _SECONDS_TO_TELL
        while self._process is not None and not self._is_done and (left := until - time.monotonic()) > 0:
            self._await(min(left, 0.1))
            self._pass_on()
            self._listen()
            if time.monotonic() > told_at:
                told_at = float("inf")
                self._say(f"waiting for {self._names}, {self._seconds_to_close - _SECONDS_TO_TELL:.0f} s at most")
        if self._process is not None:
            if not self._is_done:
                self._warn(f"warning: {self._names} did not end in time, and their process was ended")
            self._end()

    def _await(self, seconds: float) -> None:
        """Wait so long at most for an answer, and for room in the pipe where something waits for it."""
        with selectors.DefaultSelector() as ready:
            ready.register(self._out, selectors.EVENT_READ)
            if self._waiting:
                ready.register(self._in, selectors.EVENT_WRITE)
            ready.select(seconds)

    def _pass_on(self) -> None:
        """Write what the pipe takes."""
        while self._waiting and self._process is not None:
            text = first_of(self._waiting)
            try:
                written = os.write(self._in, text)
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._listen()
                self._lost()
                return
            left = written
            while left and left >= len(self._waiting[0]):
                left -= len(self._waiting.popleft())
            if written < len(text):
                self._waiting[0] = self._waiting[0][left:]
                return

    def _listen(self) -> None:
        """Tell the user what the other process has to tell."""
        while self._process is not None:
            try:
                part = os.read(self._out, 65536)
            except BlockingIOError:
                return
            if not part:
                self._lost()
                return
            *lines, self._heard = (self._heard + part).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "say" in message:
                    self._told.add(message["say"])
                    self._say(message["say"])
                if "lost" in message:
                    self._warn(message["lost"])
                self._is_done = self._is_done or message.get("done", False)

    def _lost(self) -> None:
        if self._process is not None and not self._is_done:
            code = self._process.poll()
            by = f" by signal {signal.Signals(-code).name}" if code is not None and code < 0 else ""
            self._warn(f"warning: the process of {self._names} ended{by}; training goes on")
            self._end()

    def _warn(self, text: str) -> None:
        """Tell of rows that do not reach a tracker, and that they are not lost, where that is so."""
        self._has_lost = True
        self._say(text + ("; metrics.jsonl has every number" if self._has_all() else ""))

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        if not self._is_done:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _environment() -> dict[str, str]:
    """That of this process, with all places where it finds modules: a tracker of the user's own may lie there."""
    # A notebook that uses wandb itself has a service of its own, which is not to be shared.
    mine = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {**mine, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
