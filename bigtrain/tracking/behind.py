"""Rows of numbers written in a thread: a disk that is slow for a moment must not hold up a step.

To encode a row and write it takes a step that logs five times as long as it would in a row of many, whose code and data
are at hand; so they are taken ten times a second. What happens to a run (an event, an evaluation) is written at once,
with all before it, and so are rows before a checkpoint is begun: a run that is killed goes on without a hole in them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bigtrain.tracking.base import Tracker, kind_of

_SECONDS_BETWEEN = 0.1


class Buffered(Tracker, Protocol):
    """A tracker that can keep rows until it is told to write them."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""

    def flush(self) -> None:
        """Write what was kept."""


class Behind:
    """Hands rows to trackers later, or at once where they cannot wait.

    Args:
        trackers: Who takes them, one row after the other.
    """

    def __init__(self, trackers: Sequence[Buffered]) -> None:
        self._trackers = trackers
        self._rows: deque[Mapping[str, Any]] = deque()
        self._lock = threading.RLock()
        self._has_rows, self._closing = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Raises:
            Exception: What a tracker raised; a later call or `flush` raises it where the row waits.
        """
        self._rows.append(row)
        if kind_of(row) != "train":
            self.flush()
        elif not self._has_rows.is_set():
            self._has_rows.set()

    def flush(self) -> None:
        """Write all rows.

        Raises:
            Exception: What a tracker raised.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            while self._rows:
                row = self._rows.popleft()
                for tracker in self._trackers:
                    tracker.add(row)
            for tracker in self._trackers:
                tracker.flush()

    def close(self) -> None:
        """Write what is left, and close the trackers."""
        self._closing.set()
        self._has_rows.set()
        self._thread.join()
        try:
            self.flush()
        finally:
            for tracker in self._trackers:
                tracker.close()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._has_rows.wait()
            self._closing.wait(_SECONDS_BETWEEN)
            self._has_rows.clear()
            try:
                self.flush()
            except BaseException as error:
                self._error = error
                return
