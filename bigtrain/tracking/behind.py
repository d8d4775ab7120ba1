"""Rows of numbers written in a thread: a disk that is slow for a moment must not hold up a step.

To encode a row and write it takes a step that logs five times as long as it would in a row of many, whose code and data
are at hand; so they are taken ten times a second. What happens to a run (an event, an evaluation) is written at once,
with all before it, and so are rows before a checkpoint is begun: a run that is killed goes on without a hole in them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bigtrain.tracking.base import Tracker, closing_all, kind_of

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN = 0.1
# A disk that does not answer for longer: the training goes on, and can be ended. Rows wait, but not without bounds.
_LONGEST_WAIT_S, _MOST_WAITING = 10.0, 10_000


class Buffered(Tracker, Protocol):
    """A tracker that can keep rows until it is told to write them."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""

    def flush(self) -> None:
        """Write what was kept."""


class Behind:
    """Hands rows to trackers later, or at once where they cannot wait.

    Only its thread calls them, so that what interrupts the training does not interrupt a line.

    Args:
        trackers: Who takes them, one row after the other.
    """

    def __init__(self, trackers: Sequence[Buffered]) -> None:
        self._trackers = trackers
        self._waiting: deque[Mapping[str, Any] | threading.Event] = deque()  # rows, and who waits for those before
        self._asked: list[threading.Event] = []  # who waits for what is being written now
        self._has_rows, self._is_urgent = threading.Event(), threading.Event()
        self._is_closing = self._is_held_up = False
        self._pid = os.getpid()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Raises:
            Exception: What a tracker raised; a later call or `flush` raises it where the row waits.
        """
        self._waiting.append(row)
        if kind_of(row) != "train" or self._error is not None or len(self._waiting) > _MOST_WAITING:
            self.flush()
        elif not self._has_rows.is_set():
            self._has_rows.set()

    def flush(self) -> None:
        """Wait until all rows are written, but not for a disk that does not answer.

        Raises:
            Exception: What a tracker raised.
        """
        is_written = threading.Event()
        self._waiting.append(is_written)
        self._hurry()
        if self._thread.is_alive():  # not in a process that was forked, nor after an error
            self._is_held_up = not is_written.wait(self._patience)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write what is left, and close the trackers."""
        if os.getpid() != self._pid:  # forked by the user's code, and ended by an error: all this is its parent's
            return
        self._is_closing = True
        self._hurry()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            _log.warning("the disk that the run's numbers go to does not answer: the last ones may be lost")
            return
        with closing_all(self._trackers):
            if self._error is not None:
                raise self._error

    @property
    def _patience(self) -> float:
        return _SECONDS_BETWEEN if self._is_held_up else _LONGEST_WAIT_S

    def _hurry(self) -> None:
        self._is_urgent.set()
        self._has_rows.set()

    def _work(self) -> None:
        try:
            while not self._is_closing:
                self._has_rows.wait()
                self._is_urgent.wait(_SECONDS_BETWEEN)
                self._has_rows.clear()
                self._is_urgent.clear()
                self._write()
            self._write()
        except BaseException as error:
            self._error = error
            self._asked += [item for item in self._waiting if isinstance(item, threading.Event)]
            self._answer()

    def _write(self) -> None:
        while self._waiting:
            item = self._waiting.popleft()
            if isinstance(item, threading.Event):
                self._asked.append(item)
                continue
            for tracker in self._trackers:
                tracker.add(item)
        for tracker in self._trackers:
            tracker.flush()
        self._answer()

    def _answer(self) -> None:
        while self._asked:
            self._asked.pop().set()
