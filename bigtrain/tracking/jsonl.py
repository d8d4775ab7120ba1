"""metrics.jsonl: one JSON object a line, from which every other picture of a run can be made again."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.metrics import first_of, to_line

# What waits for a disk that is full; the oldest lines are given up after that.
_MOST_WAITING = 100_000


class MetricsFile:
    """Appends rows to a file, each of which is there whole or not at all.

    Floats are written so that they read back to the last bit; those that JSON does not know as "nan", "inf" and "-inf".
    Where the disk takes nothing, training goes on, lines wait in memory, and that is said once.

    Args:
        path: The file; made with its first line. A last line that a kill has cut off is taken away.
        say: Tells the user.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._file: int | None = None
        self._size = 0
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._num_given_up = 0
        self._has_complained = False

    @property
    def has_every_line(self) -> bool:
        """Whether all that was logged is in the file."""
        return not self._waiting and not self._num_given_up

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        self.add(row)
        self.flush()

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row until `flush`."""
        if "histograms" in row:
            return
        self._num_given_up += len(self._waiting) == _MOST_WAITING
        self._waiting.append(to_line(row))

    def flush(self) -> None:
        """Append a line for each row that was kept."""
        if not self._waiting:
            return
        try:
            self._write()
        except OSError as error:
            self._let_go()
            if not self._has_complained:
                self._has_complained = True
                self._say(f"warning: {self._path}: {error.strerror}; training goes on, and lines wait")

    def _write(self) -> None:
        if self._file is None:
            self._file, self._size = _open(self._path)
        while self._waiting:
            text = first_of(self._waiting)
            written = os.write(self._file, text)
            whole = text.rfind(b"\n", 0, written) + 1
            self._size += whole
            for _ in range(text.count(b"\n", 0, whole)):
                self._waiting.popleft()
            if written < len(text):  # the disk filled up, perhaps in the middle of a line
                os.ftruncate(self._file, self._size)
                if not whole:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Write what waits, if the disk takes it, and close the file."""
        reason: str | None = "they waited too long"
        if self._waiting:
            try:
                self._write()
            except OSError as error:
                reason = error.strerror
        if not self.has_every_line:
            self._say(f"warning: {len(self._waiting) + self._num_given_up} lines of {self._path} are lost: {reason}")
        refusal = self._let_go()
        if refusal:
            self._say(f"warning: the last lines of {self._path} may be lost: {refusal.strerror}")

    def _let_go(self) -> OSError | None:
        """Close the file, what a network's disk may refuse; what is written next opens it again, as it may be back."""
        file, self._file = self._file, None
        try:
            if file is not None:
                os.close(file)
        except OSError as error:
            return error
        return None


def _open(path: Path) -> tuple[int, int]:
    """The file, to append to, and its size; a line that was cut off is cut away, as no line could follow it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    size = os.fstat(file).st_size
    end = size
    while end and os.pread(file, 1, end - 1) != b"\n":
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
    if end < size:
        os.ftruncate(file, end)
    return file, end
