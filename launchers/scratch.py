"""A folder for what nobody reads, which goes with its launcher: at its end, or at the next start where it was killed.

Whoever lives holds a lock on its folder, which the system takes back from a process that ends in whatever way.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# For a socket, whose path may have 107 characters: a user's TMPDIR can be longer.
PLACE = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
_PREFIX = "bigtrain-agent-"
# Between its making and its lock a folder looks like one that was left behind.
_NEW_S = 60.0


class Scratch:
    """The folder of a launcher that lives; those of launchers that were killed are taken away."""

    def __init__(self) -> None:
        _tidy(PLACE)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=PLACE)
        self._lock = _locked(Path(self.path))

    def close(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _tidy(place: Path) -> None:
    """Take away what launchers of this user left who live no more."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or time.time() - folder.lstat().st_mtime < _NEW_S:
                continue
            lock = _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process does, or it is another user's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:  # it is held, or this file system has no locks
        pass
    os.close(descriptor)
    return None
