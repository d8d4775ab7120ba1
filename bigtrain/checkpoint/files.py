"""Every operation on files that checkpoints need, in one place.

One place, so that a test can count operations, kill the process before any of them, or let any of them fail; a test
holds that no other module of the package touches files. Whatever is opened must be a regular file and no link, so
that a folder that somebody else prepared cannot lead anywhere else.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

Hook = Callable[[str, Path], None]

_UNIT = 1 << 12  # bytes; disks are addressed by so many at most
_LEAST_DIRECT = 1 << 20  # bytes; a disk is waited for each time
_DIRECT = ("ext4", "xfs")  # of local disks; how it would do elsewhere has not been measured
_NOT_SO = (errno.EINVAL, errno.EFAULT)  # the device wants larger blocks, or cannot reach this memory
_WIPE_ON_FORK = 18 if sys.platform == "linux" else -1  # MADV_WIPEONFORK, which mmap has no name for
_MOST_BUFFERS = 512  # of one vectored write; POSIX promises 16, Linux and macOS allow 1024


class Files:
    """The file system, as checkpoints use it.

    Args:
        before: Called with the operation's name and the path before every operation; what it raises, the operation
            raises.
        pauses: How long to wait before each new try of a read that failed, in seconds.
    """

    def __init__(self, before: Hook | None = None, pauses: Sequence[float] = (0.05, 0.2, 0.8)) -> None:
        self.before = before or (lambda operation, path: None)
        self.pauses = tuple(pauses)

    def make_folder(self, path: Path) -> None:
        """Make a folder and what is above it, unless it is there."""
        self.before("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> Output:
        """Make a new file; one that is there already is an error."""
        self.before("create", path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return Output(self, path, os.open(path, flags, 0o666))

    def open(self, path: Path) -> Input:
        """Open a regular file for reading.

        Raises:
            NotRegularError: Where it is a link, a folder, a pipe or a device.
        """
        self.before("open", path)
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise NotRegularError(path)
        # A pipe must not block before it can be seen to be one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NotRegularError(path)
        return Input(self, path, descriptor)

    def write_whole(self, path: Path, data: bytes) -> None:
        """Make a new file with these bytes, on the disk when this returns."""
        with self.create(path) as file:
            file.write([memoryview(data)], 0)
            file.sync()

    def names(self, folder: Path) -> list[str]:
        """What lies in a folder, sorted; nothing where there is no folder."""
        self.before("list", folder)
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, path: Path) -> bool:
        """Whether anything has this name, a link to nothing included."""
        self.before("look", path)
        return os.path.lexists(path)

    def is_folder(self, path: Path) -> bool:
        """Whether this is a folder itself, and no link to one."""
        self.before("look", path)
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name."""
        self.before("rename", old)
        os.rename(old, new)

    def sync_folder(self, path: Path) -> None:
        """Let the names in a folder survive a power failure."""
        self.before("sync folder", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all in it, following no links; nothing where there is none."""
        if not self.is_folder(path):
            return
        for name in self.names(path):
            if self.is_folder(path / name):
                self.remove_tree(path / name)
            else:
                self.before("remove", path / name)
                (path / name).unlink(missing_ok=True)
        self.before("rmdir", path)
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """How much may still be written where this path is, or will be."""
        while not path.exists() and path != path.parent:
            path = path.parent
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def free_memory(self) -> int | None:
        """How many bytes of host memory may still be taken; None where the system does not say."""
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)

    def memory(self, num_bytes: int) -> mmap.mmap:
        """Host memory in pages of its own: large ones, which a disk takes in few pieces, and empty in a fork."""
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Not MADV_DONTFORK: a forked process would put memory of its own there, and lose that as it lets go of this.
        for advice in (getattr(mmap, "MADV_HUGEPAGE", -1), _WIPE_ON_FORK):
            with suppress(OSError, AttributeError):  # not on every system
                memory.madvise(advice)
        return memory

    def has_spare_core(self) -> bool:
        """Whether a second thread of every process on this machine finds a core of its own."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = os.environ.get("LOCAL_WORLD_SIZE", "")
        return cores >= 2 * (int(processes) if processes.isdecimal() else 1)

    def pause(self, seconds: float) -> None:
        """Wait before a new try."""
        time.sleep(seconds)


class NotRegularError(Exception):
    """What should be a file is a link, a folder, a pipe or a device."""


class _Open:
    def __init__(self, files: Files, path: Path, descriptor: int) -> None:
        self.path = path
        self._before = files.before
        self._descriptor = descriptor

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; again is nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        with suppress(OSError):
            self.close()


class Output(_Open):
    """A file that is being written."""

    _is_direct = False  # the system takes what is written from the memory that it lies in, past the page cache
    _can_be_direct: bool | None = None  # not tried yet

    def write(self, buffers: Iterable[memoryview], offset: int, *, direct: bool = False) -> None:
        """Write these bytes, one after the other, from `offset` on.

        Args:
            buffers: The bytes.
            offset: Where in the file.
            direct: Whether they may go past the page cache, if they are many, and whole pages there and here.
        """
        left = [buffer for buffer in buffers if buffer.nbytes]
        self._set_direct(direct and self._can_be_direct is not False and _are_pages(left, offset))
        while left:
            self._before("write", self.path)
            try:
                written = os.pwritev(self._descriptor, left[:_MOST_BUFFERS], offset)
            except OSError as error:
                if not self._is_direct or error.errno not in _NOT_SO:
                    raise
                self._can_be_direct = False
                self._set_direct(False)
                continue
            offset += written
            left = _after(left, written)

    def _set_direct(self, wanted: bool) -> None:
        if wanted and self._can_be_direct is None:
            self._can_be_direct = _file_system_of(self._descriptor) in _DIRECT
        if (wanted and not self._can_be_direct) or wanted == self._is_direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags ^ os.O_DIRECT)
        except OSError:
            if not wanted:
                raise
            self._can_be_direct = False
        else:
            self._is_direct = wanted

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        self._before("sync", self.path)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; again is nothing. NFS reports what could not be written here."""
        if self._descriptor >= 0:
            try:
                self._before("close", self.path)
            finally:
                super().close()


class Input(_Open):
    """A file that is being read."""

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on.

        Raises:
            EOFError: Where the file ends before.
        """
        while into.nbytes:
            self._before("read", self.path)
            count = os.preadv(self._descriptor, [into], offset)
            if count == 0:
                raise EOFError(f"{self.path} ends at byte {offset}")
            offset += count
            into = into[count:]


def _are_pages(buffers: Sequence[memoryview], offset: int) -> bool:
    """Whether these are many bytes, and whole pages in memory and from `offset` on in a file."""
    places = [offset, *(np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers)]
    sizes = [buffer.nbytes for buffer in buffers]
    return sum(sizes) >= _LEAST_DIRECT and not any(number % _UNIT for number in (*places, *sizes))


def _file_system_of(descriptor: int) -> str | None:
    """The kind of file system that an open file lies on; None where the system does not say."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return None
    found = re.search(rb"^\S+ \S+ %b .*? - (\S+)" % number.encode(), mounts, re.MULTILINE)
    return os.fsdecode(found[1]) if found else None


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers when the first `count` bytes are gone."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []


DISK = Files()
