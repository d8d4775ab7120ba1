"""One shard file, open for reading: bytes that are verified before anybody sees them.

A mismatch counts only if it stays when the file is opened anew. An I/O error is tried again a few times, and is
never called corruption; a file that is not there, is no file, or has another length than the manifest says, is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from bigtrain.checkpoint.files import Files, Input, NotRegularError
from bigtrain.checkpoint.layout import Key
from bigtrain.checkpoint.manifest import Shard
from bigtrain.checkpoint.shards import CHUNK, Entry, Header, decode, hash_of
from bigtrain.errors import CheckpointError, CorruptError, ReadError

T = TypeVar("T")
_log = logging.getLogger(__name__)

SHARED = 4 * CHUNK  # so much at least is read by two threads: to hand over less takes as long


class ShardFile:
    """A shard file whose header has been verified.

    Args:
        path: Where it lies.
        expected: What the manifest says of it.
        files: The file system.
        helper: A thread that reads half of what is large; None: there is none.

    Raises:
        CorruptError: Where it is not what was written.
        ReadError: Where it cannot be read.
    """

    def __init__(self, path: Path, expected: Shard, files: Files, helper: Executor | None = None) -> None:
        self.path = path
        self._helper = helper
        self._expected = expected
        self._files = files
        self._file: Input | None = None
        self._edge = memoryview(bytearray(CHUNK))  # the chunk of which a part was wanted last, and which it is
        self._edge_place: int | None = None
        self.header, self._hashes = self._verified_header()
        self._by_key: dict[Key, list[Entry]] = {}
        for entry in self.header.entries:
            self._by_key.setdefault(entry.key, []).append(entry)

    def entries_of(self, key: Key) -> list[Entry]:
        """The boxes of a tensor."""
        return self._by_key.get(key, [])

    def read(self, entry: Entry, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a box from its byte `begin` on.

        Whole chunks go straight to where they are wanted and are hashed there; of the first and the last one, which
        may be wanted in part, a copy is made.
        """
        while out.nbytes:
            number, skipped = divmod(begin, CHUNK)
            if skipped or out.nbytes < min(CHUNK, entry.num_bytes - begin):
                count = min(CHUNK - skipped, out.nbytes)
                out[:count] = self._chunk(entry, number)[skipped : skipped + count]
            else:
                is_to_the_end = begin + out.nbytes == entry.num_bytes
                count = out.nbytes if is_to_the_end else out.nbytes // CHUNK * CHUNK
                self._read_verified(entry, number, out[:count])
            begin, out = begin + count, out[count:]

    def check(self, entry: Entry, scratch: memoryview) -> None:
        """Read all of a box and verify it.

        Args:
            entry: The box.
            scratch: Some whole chunks of memory.
        """
        for begin in range(0, entry.num_bytes, scratch.nbytes):
            self._read_verified(entry, begin // CHUNK, scratch[: entry.num_bytes - begin])

    def close(self) -> None:
        """Close the file; it is opened again where it is needed."""
        if self._file:
            self._file.close()
        self._file = None

    # ---- verified reading ----------

    def _chunk(self, entry: Entry, number: int) -> memoryview:
        """One chunk of a box, verified; it stays until the next one is asked for."""
        place = entry.first_chunk + number
        chunk = self._edge[: min(CHUNK, entry.num_bytes - number * CHUNK)]
        if self._edge_place != place:
            self._edge_place = None
            self._read_verified(entry, number, chunk)
            self._edge_place = place
        return chunk

    def _read_verified(self, entry: Entry, number: int, out: memoryview) -> None:
        """Fill `out` with whole chunks of a box, from chunk `number` on."""
        wrong = self._read(entry, number, out)
        if not wrong:
            return
        self.close()
        for start in wrong:
            if self._read(entry, number + start // CHUNK, out[start : start + CHUNK]):
                place = self._expected.header_bytes + entry.begin + number * CHUNK + start
                raise corrupt(self.path, f"the bytes from {place:,} on are not what was written ({entry.title})")
        _log.warning("%s was read wrongly once, and rightly the second time: the storage is not reliable", self.path)

    def _read(self, entry: Entry, number: int, out: memoryview) -> list[int]:
        """Fill `out` with whole chunks of a box, and say which are not what was written."""
        offset = self._expected.header_bytes + entry.begin + number * CHUNK
        first = entry.first_chunk + number

        def fill(file: Input, starts: Iterator[int], wrong: list[int]) -> None:
            for start in starts:
                chunk = out[start : start + CHUNK]
                file.read(offset + start, chunk)
                place = 16 * (first + start // CHUNK)
                if hash_of(chunk) != self._hashes[place : place + 16]:  # while it is in the cache
                    wrong.append(start)

        def read() -> list[int]:
            wrong: list[int] = []
            work = self._opened(), iter(range(0, out.nbytes, CHUNK)), wrong
            other = self._helper.submit(fill, *work) if self._helper and out.nbytes >= SHARED else None
            try:
                fill(*work)
            finally:
                if other and not other.cancel():
                    wait([other])  # the file must not be closed before
            if other and not other.cancelled():
                other.result()
            return sorted(wrong)

        return reliably(read, self.path, self._files, self.close)

    def _verified_header(self) -> tuple[Header, bytes]:
        raw = read_verified(
            self.path, self._expected.header_bytes, self._expected.header_hash, self._files, self._expected.num_bytes
        )
        try:
            return decode(raw, self._expected.num_bytes - self._expected.header_bytes)
        except ValueError as error:
            raise corrupt(self.path, str(error)) from error

    def _opened(self) -> Input:
        if self._file is None:
            self._file = self._files.open(self.path)
        return self._file


def read_verified(path: Path, count: int, expected: bytes, files: Files, num_bytes: int | None = None) -> bytes:
    """The first bytes of a file, if it has the length and they the hash that are expected.

    Args:
        path: The file.
        count: How many bytes.
        expected: Their XXH3-128.
        files: The file system.
        num_bytes: The length of the file; None: those bytes are all of it.

    Raises:
        CorruptError: Where they have not, also when the file is opened anew.
        ReadError: Where it cannot be read.
    """
    length = count if num_bytes is None else num_bytes

    def look() -> tuple[bytes, str]:
        with closing(files.open(path)) as file:
            if file.size != length:
                return b"", f"it has {file.size:,} bytes, and {length:,} were written"
            raw = bytearray(count)
            file.read(0, memoryview(raw))
        return bytes(raw), "" if hash_of(raw) == expected else f"its first {count:,} bytes are not what was written"

    raw, wrong = reliably(look, path, files)
    if wrong:
        raw, wrong = reliably(look, path, files)
    if wrong:
        raise corrupt(path, wrong)
    return raw


def read_all(path: Path, most: int, files: Files) -> bytes:
    """The bytes of a file of unknown length.

    Raises:
        CorruptError: Where it is not there, no file, or larger than `most`.
        ReadError: Where it cannot be read.
    """

    def look() -> bytes | None:
        with closing(files.open(path)) as file:
            if file.size > most:
                return None
            raw = bytearray(file.size)
            file.read(0, memoryview(raw))
        return bytes(raw)

    raw = reliably(look, path, files)
    if raw is None:
        raise corrupt(path, f"it has more than {most:,} bytes")
    return raw


def reliably(action: Callable[[], T], path: Path, files: Files, before_retry: Callable[[], None] = lambda: None) -> T:
    """Read something, and try again where that fails.

    Raises:
        CheckpointError: Where its folder has gone.
        CorruptError: Where the file stays away, is no file, or ends too early.
        ReadError: Where another error stays.
    """
    for pause in (*files.pauses, None):
        try:
            return action()
        except NotRegularError as error:
            raise corrupt(path, "it is a link, or no file at all") from error
        except EOFError as error:
            failure: Exception = error
        except OSError as error:
            failure = error
        before_retry()
        if pause is not None:
            files.pause(pause)
    if isinstance(failure, EOFError):
        raise corrupt(path, "it has become shorter") from failure
    if isinstance(failure, FileNotFoundError) and not files.is_folder(path.parent):
        raise removed(path.parent) from failure
    if isinstance(failure, FileNotFoundError | NotADirectoryError):
        raise corrupt(path, "it is not there") from failure
    raise ReadError(
        f"cannot read {path}: {getattr(failure, 'strerror', None) or failure}",
        where=str(path),
        remedy="see to the storage and start again; whether the checkpoint is good is not known",
    ) from failure


def removed(path: Path) -> CheckpointError:
    """The error where a checkpoint has gone while it was read, which says nothing about what it was."""
    return CheckpointError(
        f"{path} has been removed while it was read",
        where=str(path),
        remedy="take a newer one; a run that goes on keeps more of them where checkpoint.keep says so",
    )


def corrupt(path: Path, problem: str) -> CorruptError:
    """The error that names a bad file."""
    return CorruptError(f"{path.parent.name}/{path.name} is damaged: {problem}", where=str(path))
