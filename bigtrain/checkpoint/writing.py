"""Writing a checkpoint: every rank its own pieces as they lie, and rank 0 the commit.

1. Rank 0 makes a folder under a temporary name with the attempt in it.
2. Every rank writes one shard file, hashing as it goes, and syncs it. What is planned is planned by each rank alone.
3. The ranks tell one another whether that went well, and the length and header hash of each file.
4. Rank 0 reads the headers of the files that hold the beginning or the end of a tensor, finds the rules by which
   tensors are cut, and sends them to all; every rank sees whether its own pieces follow them. So a tensor with a
   hole, or one that two ranks own, is found here and not when it is read.
5. Rank 0 asks whether the run is still ours, writes the manifest, syncs, and renames the folder.

Whatever fails before the end of 5, on any rank, fails on all of them with the same error; nothing is committed then,
and the temporary folder is removed. A rank that is killed leaves it behind, and `prune` takes it away.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.checkpoint import json_exact
from bigtrain.checkpoint.files import DISK, Files, Output
from bigtrain.checkpoint.folders import folder_of, temporary_of
from bigtrain.checkpoint.layout import Cut, Key, Part, check_cover, find_cuts, is_corner, strays
from bigtrain.checkpoint.manifest import MANIFEST, STATE, Layout, Manifest, Shard, shard_name
from bigtrain.checkpoint.ranks import Ranks
from bigtrain.checkpoint.shards import CHUNK, DTYPES, LARGEST_HEADER, PAGE, Entry, Header, decode, hash_of, lay_out
from bigtrain.errors import DiskFullError, LeaseError, SaveError
from bigtrain.state import EngineState, Piece

# What is hashed, then handed to the system, and copied from a device at once; whole chunks.
_BLOCK = 4 * CHUNK
_IMAGE_BLOCK = 16 * CHUNK  # a disk that takes it from there disturbs others the less, the less often it begins
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Written(NamedTuple):
    """What a rank tells the others of its file."""

    shard: Shard
    is_corner: bool


@dataclass(frozen=True)
class Saving:
    """One checkpoint that is being written.

    Attributes:
        ranks: Who writes.
        folder: Where checkpoints lie.
        step: How many steps have been taken.
        attempt: Which start of the run this is, the same on all ranks.
        still_ours: Asked on rank 0 before the commit; False where another attempt owns the run now.
        ready: Called before the state is read.
        image: All that this rank writes of the state, as it will lie in the file; the pieces are views of it.
        files: The file system.
    """

    ranks: Ranks
    folder: Path
    step: int
    attempt: str = "0"
    still_ours: Callable[[], bool] = lambda: True
    ready: Callable[[], None] = lambda: None
    image: memoryview | None = None
    files: Files = DISK

    @property
    def path(self) -> Path:
        """Where the checkpoint will lie."""
        return folder_of(self.folder, self.step)

    @property
    def temporary(self) -> Path:
        """Where it lies until then."""
        return temporary_of(self.folder, self.step, self.attempt)

    def save(self, state: EngineState, extra: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write everything; see `save`."""
        ranks = self.ranks
        ranks.agree(self._begin, SaveError)
        try:
            header, written, described = ranks.agree(lambda: self._write(state, extra, own), SaveError)
            all_written: list[_Written] = ranks.gather(written)
            layouts = self._agree_on_layouts(header.parts(), all_written)
            manifest = Manifest(self.step, layouts, described, tuple(other.shard for other in all_written))
            ranks.agree(lambda: self._commit(manifest), SaveError)
        except BaseException as error:
            # What all agree on, or what only one could write: nobody is writing any more.
            if ranks.is_main and (isinstance(error, SaveError) or ranks.size == 1):
                with suppress(OSError):
                    self.files.remove_tree(self.temporary)
            raise
        return self.path

    # ---- 1 and 2: before anything is agreed ----------

    def _begin(self) -> None:
        if not self.ranks.is_main:
            return
        with _explained(self, self.path, 0):
            if self.files.exists(self.path):
                raise SaveError(
                    f"there is a checkpoint of step {self.step} already",
                    where=str(self.path),
                    remedy="nothing was changed; remove it, or continue from it",
                )
            is_first = not self.files.exists(self.folder)
            self.files.remove_tree(self.temporary)
            self.files.make_folder(self.temporary)
            if is_first:
                self.files.sync_folder(self.folder.parent)

    def _write(
        self, state: EngineState, extra: Mapping[str, Any], own: Mapping[str, Any]
    ) -> tuple[Header, _Written, tuple[int, bytes]]:
        self.ready()
        return *self._write_own(state.pieces, own), self._write_state(state.hyper, extra)

    def _write_own(self, pieces: Sequence[Piece], own: Mapping[str, Any]) -> tuple[Header, _Written]:
        pieces = in_file_order(pieces)
        header = lay_out([_described(piece) for piece in pieces], _as_json(own, "own"))
        path = self.temporary / shard_name(self.ranks.rank)
        if len({entry.title for entry in header.entries}) != len(header.entries):
            raise SaveError("a piece of the state is given twice", where=f"rank {self.ranks.rank}")
        empty = header.encode()
        if len(empty) > LARGEST_HEADER:
            raise SaveError(f"the header of {path} would have {len(empty)} bytes, more than {LARGEST_HEADER}")
        num_bytes = len(empty) + header.data_bytes
        with _explained(self, path, num_bytes):
            self.files.make_folder(self.temporary)  # a shared file system may not show it yet
            with self.files.create(path) as file:
                hashes = _write_data(file, len(empty), header.entries, pieces, self.image)
                raw = header.encode(hashes)
                file.write([memoryview(raw)], 0)
                file.sync()
        shard = Shard(num_bytes, len(raw), hash_of(raw))
        return header, _Written(shard, is_corner(header.parts().values()))

    def _write_state(self, hyper: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[int, bytes]:
        """Write state.json on rank 0, and return its length and hash there."""
        if not self.ranks.is_main:
            return 0, b""
        raw = _as_json({"hyper": hyper, "extra": extra}, "state").encode()
        with _explained(self, self.temporary / STATE, len(raw)):
            self.files.write_whole(self.temporary / STATE, raw)
        return len(raw), hash_of(raw)

    # ---- 4: where everything lies ----------

    def _agree_on_layouts(self, mine: Mapping[Key, Part], written: Sequence[_Written]) -> dict[Key, Layout]:
        """The layout of every tensor. Every rank must call it."""
        ranks = self.ranks
        found = ranks.agree(lambda: find_cuts(self._corners(written)) if ranks.is_main else None, SaveError)
        cuts: dict[Key, tuple[Part, Cut]] = ranks.broadcast(found)
        odd = sorted(set().union(*ranks.gather(strays(ranks.rank, mine, cuts))))
        layouts = {key: Layout(part.shape, part.dtype, cut) for key, (part, cut) in cuts.items()}
        if odd:
            parts = ranks.gather({key: mine[key] for key in odd if key in mine})
            ranks.agree(lambda: layouts.update({key: self._listed(key, parts) for key in odd}), SaveError)
        return dict(sorted(layouts.items()))

    def _corners(self, written: Sequence[_Written]) -> dict[int, dict[Key, Part]]:
        return {
            writer: self._read_header(writer, other.shard) for writer, other in enumerate(written) if other.is_corner
        }

    def _read_header(self, writer: int, shard: Shard) -> dict[Key, Part]:
        path = self.temporary / shard_name(writer)
        raw = bytearray(shard.header_bytes)
        try:
            with self.files.open(path) as file:
                file.read(0, memoryview(raw))
            if hash_of(raw) != shard.header_hash:
                raise ValueError("it is not what was written")
            return decode(bytes(raw), shard.num_bytes - shard.header_bytes)[0].parts()
        except (OSError, EOFError, ValueError) as error:
            raise SaveError(f"the header of {path}, just written, cannot be read back: {error}") from error

    def _listed(self, key: Key, parts: Sequence[Mapping[Key, Part]]) -> Layout:
        held = {writer: theirs[key] for writer, theirs in enumerate(parts) if key in theirs}
        try:
            check_cover(key, list(held.values()))
        except ValueError as error:
            raise SaveError(str(error)) from error
        seen = next(iter(held.values()))
        return Layout(seen.shape, seen.dtype, None, tuple(held))

    # ---- 5 ----------

    def _commit(self, manifest: Manifest) -> None:
        if not self.ranks.is_main:
            return
        if not self.still_ours():
            raise LeaseError(
                f"another start has taken the run over, or its folder is gone: step {self.step} is not committed",
                where=str(self.folder),
                remedy="let this one end; the run goes on in the other, or the same command begins it anew",
            )
        raw = manifest.encode()
        with _explained(self, self.temporary / MANIFEST, len(raw)):
            self._check_shared(len(manifest.shards))
            self.files.write_whole(self.temporary / MANIFEST, raw)
            self.files.sync_folder(self.temporary)
            if self.files.exists(self.path):  # an empty folder would be replaced silently
                raise SaveError(f"{self.path} has come to be while this checkpoint was written")
            self.files.rename(self.temporary, self.path)
            try:
                self.files.sync_folder(self.folder)
            except OSError:
                # Whether it would survive a power failure is not known: it must not look committed.
                self.files.rename(self.path, self.temporary)
                raise

    def _check_shared(self, num_shards: int) -> None:
        """See that the files of all ranks lie where rank 0 looks, and not each on a disk of its own machine."""
        seen = set(self.files.names(self.temporary))
        for name in map(shard_name, range(num_shards)):
            if name not in seen and not self.files.exists(self.temporary / name):  # a listing may be an old one
                raise SaveError(
                    f"{name} has been written, and rank 0 does not see it in {self.temporary}",
                    where=str(self.folder),
                    remedy="set run.dir to a folder that all machines share",
                )


def save(
    ranks: Ranks,
    folder: Path,
    step: int,
    state: EngineState,
    *,
    extra: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    attempt: str = "0",
    still_ours: Callable[[], bool] = lambda: True,
    ready: Callable[[], None] = lambda: None,
    image: memoryview | None = None,
    files: Files = DISK,
) -> Path:
    """Write a checkpoint and commit it. Every rank must call it; the state must not change meanwhile.

    Args:
        ranks: Who writes.
        folder: Where checkpoints lie.
        step: How many steps have been taken.
        state: This rank's part of the state.
        extra: What else belongs to it, the same on all ranks (rank 0's is written): samples seen, position in the
            data, fingerprint, run file. None, bool, int, float, str, bytes, and lists, tuples and mappings of these.
        own: What else belongs to this rank alone: the states of its random number generators.
        attempt: Which start of the run this is, the same on all ranks.
        still_ours: Asked on rank 0 before the commit; False where another attempt owns the run now.
        ready: Called before the state is read; what it raises, all ranks hear of.
        image: Where the pieces are views of one block of memory that begins with a page, in the order of
            `in_file_order` and without gaps: that block. It goes past the page cache where the file system can do so.
        files: The file system.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveError: On all ranks: nothing was committed, and what was before is as it was.
    """
    return Saving(ranks, Path(folder), step, attempt, still_ours, ready, image, files).save(state, extra, own or {})


def check_space(ranks: Ranks, folder: Path, num_bytes: int, *, copies: int = 2, files: Files = DISK) -> None:
    """See, before anything is trained, that checkpoints will fit. Every rank must call it.

    Args:
        ranks: Who will write.
        folder: Where checkpoints will lie.
        num_bytes: How much this rank will write (`bytes_of` its state, with what the optimizer will add).
        copies: How many checkpoints must fit: the last one stays until the next is committed.
        files: The file system.

    Raises:
        DiskFullError: Where they do not.
    """
    needed = copies * sum(ranks.gather(num_bytes))
    free = ranks.broadcast(files.free_bytes(Path(folder)) if ranks.is_main else 0)
    if free < needed:
        raise DiskFullError(
            f"{copies} checkpoints need {needed:,} bytes, and {free:,} are free",
            where=str(folder),
            remedy="free some space, or set run.dir to a larger disk",
        )


def bytes_of(state: EngineState) -> int:
    """How much this rank will write, but for names and hashes."""
    return sum(math.prod(p.box.size) * p.dtype.itemsize for p in state.pieces if p.is_owner)


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """What this rank writes of these pieces, in the order in which a shard file holds them."""
    held = [piece for piece in pieces if piece.is_owner and (piece.data.numel() or 0 in piece.shape)]
    return sorted(held, key=_alignment, reverse=True)


def _described(piece: Piece) -> tuple[Key, tuple[int, ...], str, Any]:
    if piece.dtype not in DTYPES or piece.data.dtype != piece.dtype:
        raise SaveError(f"{piece.kind} {piece.name} is {piece.data.dtype}, which a checkpoint cannot hold")
    if ":" in piece.kind or not piece.kind:
        raise SaveError(f"the kind {piece.kind!r} of {piece.name} is not a word")
    if tuple(piece.data.shape) != tuple(piece.box.size):
        raise SaveError(f"{piece.kind} {piece.name} has the shape {tuple(piece.data.shape)}, not {piece.box.size}")
    return piece.key, tuple(piece.shape), DTYPES[piece.dtype], piece.box


def _alignment(piece: Piece) -> int:
    """The largest power of two, up to a page, that divides its length in bytes."""
    num_bytes = math.prod(piece.box.size) * piece.dtype.itemsize
    return min(PAGE, num_bytes & -num_bytes)


def _as_json(value: Mapping[str, Any], what: str) -> str:
    try:
        return json_exact.dumps(value, what=what)
    except TypeError as error:
        raise SaveError(str(error), remedy="keep plain values, or bytes") from error


def _write_data(
    file: Output, offset: int, entries: Sequence[Entry], pieces: Sequence[Piece], image: memoryview | None
) -> list[bytes]:
    """Write the pieces one after the other, and return the hashes of their chunks."""
    hashes: list[bytes] = []
    waiting: list[memoryview] = []
    hashed = written = 0

    def write(until: int) -> None:
        nonlocal written
        if image is None:
            file.write(waiting, offset + written)
        else:
            file.write([image[written:until]], offset + written, direct=True)
        waiting.clear()
        written = until

    for entry, piece in zip(entries, pieces, strict=True):
        if not entry.num_bytes:
            continue
        read = getattr(piece, "read", None)  # data that are not in memory until they are written
        for block in _blocks(read() if read else piece.data):
            hashes += [hash_of(block[start : start + CHUNK]) for start in range(0, block.nbytes, CHUNK)]
            hashed += block.nbytes
            if image is None:
                waiting.append(block)
                if hashed - written >= _BLOCK or len(waiting) >= 512:
                    write(hashed)
            elif hashed - written >= _IMAGE_BLOCK:
                write(hashed - hashed % PAGE)
    if image is not None:
        write(hashed - hashed % PAGE)
    write(hashed)
    return hashes


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in blocks of whole chunks; views where it lies on the host and in one piece."""
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    most = _BLOCK // flat.element_size()
    for start in range(0, flat.numel(), most):
        yield flat[start : start + most].cpu().view(torch.uint8).numpy().data


@contextmanager
def _explained(saving: Saving, path: Path, num_bytes: int) -> Iterator[None]:
    """Turn an OSError into an error that says what could not be written, and on a full disk how much is missing."""
    free = _free(saving)  # before: afterwards the half of it that fitted takes what there was
    try:
        yield
    except OSError as error:
        where = f"rank {saving.ranks.rank}, {path}"
        if error.errno not in _FULL:
            raise SaveError(f"cannot write {path}: {error.strerror or error}", where=where) from error
        raise DiskFullError(
            f"no space for {path}: it needs {num_bytes:,} bytes, and {free} were free",
            where=where,
            remedy="free some space, keep fewer checkpoints (checkpoint.keep), or set run.dir to a larger disk",
        ) from error


def _free(saving: Saving) -> str:
    try:
        return f"{saving.files.free_bytes(saving.folder):,}"
    except OSError:
        return "an unknown number"
