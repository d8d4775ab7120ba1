"""Reading a checkpoint: any box of any tensor, whatever the engine and the number of ranks that wrote it.

Only the files that hold something of the box are opened, only the chunks of them that are needed are read, and
nothing is seen before it is verified. No memory is needed beyond what is to be filled and a few chunks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.checkpoint import json_exact
from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.folders import step_of
from bigtrain.checkpoint.layout import Key, intersection, span
from bigtrain.checkpoint.manifest import LARGEST_MANIFEST, MANIFEST, STATE, Layout, Manifest, decode, shard_name
from bigtrain.checkpoint.shard_file import SHARED, ShardFile, corrupt, read_all, read_verified, reliably
from bigtrain.checkpoint.shards import CHUNK, TORCH_DTYPES, Entry, hash_of
from bigtrain.errors import CheckpointError
from bigtrain.state import EMA, Box, TensorSpec

_MOST_OPEN = 128  # files at once
_SCRATCH = 4 * CHUNK  # bytes, for what cannot be read straight to where it is wanted
_LARGEST_STATE = 1 << 30


class CheckpointReader:
    """A checkpoint, open for reading (a `bigtrain.state.Reader`).

    Args:
        path: Its folder.
        files: The file system.

    Attributes:
        path: Its folder.
        manifest: What it consists of.
        manifest_hash: What it is known by.
        hyper: Every optimizer hyperparameter, by parameter name.
        extra: What else was kept.
        index: Every tensor's shape and dtype, by kind and name.

    Raises:
        CheckpointError: Where there is no such folder.
        CorruptError: Where the manifest or state.json is not what was written.
        ReadError: Where they cannot be read.
    """

    def __init__(self, path: Path, files: Files = DISK) -> None:
        self.path = Path(path)
        self._files = files
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._helper: Executor | None = None
        if not reliably(lambda: files.is_folder(self.path), self.path, files):
            raise CheckpointError(
                f"there is no checkpoint at {path}", where=str(path), remedy="give a folder step-…, and no link to one"
            )
        raw = read_all(self.path / MANIFEST, LARGEST_MANIFEST, files)
        try:
            self.manifest: Manifest = decode(raw)
        except ValueError:
            raw = read_all(self.path / MANIFEST, LARGEST_MANIFEST, files)  # once more, from a fresh open
            self.manifest = _decoded(raw, self.path)
        if step_of(self.path) not in (None, self.manifest.step):
            raise corrupt(self.path / MANIFEST, f"it is of step {self.manifest.step}: the folder has been renamed")
        self.manifest_hash = hash_of(raw).hex()
        self.hyper, self.extra = self._read_state()
        self.index: Mapping[Key, TensorSpec] = {
            key: TensorSpec(layout.shape, TORCH_DTYPES[layout.dtype]) for key, layout in self.manifest.tensors.items()
        }

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        while self._open:
            self._open.popitem()[1].close()
        if self._helper:
            self._helper.shutdown()
            self._helper = None

    @property
    def step(self) -> int:
        """How many steps had been taken."""
        return self.manifest.step

    @property
    def num_writers(self) -> int:
        """How many ranks wrote it."""
        return len(self.manifest.shards)

    def own(self, rank: int) -> Any:
        """What a rank kept for itself.

        Raises:
            CheckpointError: Where no such rank wrote a file.
        """
        if not 0 <= rank < self.num_writers:
            raise CheckpointError(f"{self.path} was written by {self.num_writers} ranks; there is no rank {rank}")
        shard = self.shard(rank)
        try:
            return json_exact.loads(shard.header.rank)
        except ValueError as error:
            raise corrupt(shard.path, str(error)) from error

    def check_averages(self) -> None:
        """See that there are moving averages of weights.

        Raises:
            CheckpointError: Where there are none.
        """
        if not any(kind == EMA for kind, _ in self.index):
            raise CheckpointError(
                f"{self.path} holds no averages of weights",
                where=str(self.path),
                remedy="take the weights themselves (without --ema); a run keeps averages where optim.ema says so",
            )

    def shard(self, writer: int) -> ShardFile:
        """A writer's file, its header verified."""
        found = self._open.get(writer)
        if found is None:
            if self._helper is None and self._files.has_spare_core():  # without one, two threads are slower
                self._helper = ThreadPoolExecutor(1, "checkpoint reading")  # which starts when it is needed
            path, expected = self.path / shard_name(writer), self.manifest.shards[writer]
            found = ShardFile(path, expected, self._files, self._helper)
            self._open[writer] = found
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(writer)
        return found

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out`, which has the box's size, with that part of the tensor.

        Args:
            kind: The tensor's kind.
            name: Its name.
            box: The part.
            out: Where to; on any device, of any strides; another dtype is converted to.

        Raises:
            CorruptError: Where a file is not what was written: it is named.
            ReadError: Where one cannot be read.
            CheckpointError: Where there is no such tensor, or no such part of it.
        """
        layout = self.manifest.tensors.get((kind, name))
        if layout is None or tuple(out.shape) != tuple(box.size) or not _lies_in(box, layout.shape):
            raise CheckpointError(f"{self.path} has no {kind} {name} with {box}", where=str(self.path))
        holders = list(layout.holders(*span(layout.shape, box)))
        missing = math.prod(box.size)
        beside: Future[int] | None = None
        is_shared = len(holders) == 2 and out.nbytes >= SHARED and out.device.type == "cpu"
        try:
            for writer in holders:
                sources = list(self._sources(layout, writer, (kind, name), box))
                if is_shared and writer == holders[0] and self._helper:
                    beside = self._helper.submit(_copy, sources, box, out)  # the other file is read meanwhile
                else:
                    missing -= _copy(sources, box, out)
        finally:
            if beside:
                wait([beside])
        missing -= beside.result() if beside else 0
        if missing:
            raise corrupt(self.path / MANIFEST, f"the shards do not hold {kind} {name} once, as it says")

    def _sources(self, layout: Layout, writer: int, key: Key, box: Box) -> Iterator[_Source]:
        """What a writer's file has of a box."""
        shard = self.shard(writer)
        for entry in shard.entries_of(key):
            if not layout.has_place_for(writer, entry):
                raise corrupt(shard.path, f"{entry.title} does not fit the manifest")
            shared = intersection(entry.box, box)
            if shared:
                yield _Source(shard, entry, shared)

    def _read_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        path = self.path / STATE
        num_bytes, expected = self.manifest.state
        if num_bytes > _LARGEST_STATE:
            raise corrupt(self.path / MANIFEST, f"state.json of {num_bytes:,} bytes is impossibly large")
        try:
            content = json_exact.loads(read_verified(path, num_bytes, expected, self._files))
        except ValueError as error:
            raise corrupt(path, str(error)) from error
        if not isinstance(content, dict) or [type(content.get(key)) for key in ("hyper", "extra")] != [dict, dict]:
            raise corrupt(path, "it does not hold what it should")
        if not all(isinstance(values, dict) for values in content["hyper"].values()):
            raise corrupt(path, "it does not hold hyperparameters by name")
        return content["hyper"], content["extra"]


def open_checkpoint(path: Path, files: Files = DISK) -> CheckpointReader:
    """Open a checkpoint for reading; see CheckpointReader."""
    return CheckpointReader(path, files)


class _Source(NamedTuple):
    """A part of a box of a shard."""

    shard: ShardFile
    entry: Entry
    box: Box

    def read(self, out: memoryview) -> None:
        """Fill `out` with it; it must lie in one piece."""
        at = Box(tuple(a - b for a, b in zip(self.box.offset, self.entry.box.offset, strict=True)), self.box.size)
        start, _ = span(self.entry.box.size, at)
        self.shard.read(self.entry, start * (out.nbytes // max(1, math.prod(self.box.size))), out)

    def cover(self) -> _Source:
        """The smallest part that contains it and lies in one piece in the file."""
        at = next((dim for dim, size in enumerate(self.box.size) if size != 1), len(self.box.size)) + 1
        box, held = self.box, self.entry.box
        return self._replace(box=Box(box.offset[:at] + held.offset[at:], box.size[:at] + held.size[at:]))


def _copy(sources: Iterable[_Source], box: Box, out: Tensor) -> int:
    """Fill the parts of `out`, which is `box`, that the sources have; how many elements that were."""
    return sum(_copy_one(source, box, out) for source in sources)


def _copy_one(source: _Source, box: Box, out: Tensor) -> int:
    dtype = TORCH_DTYPES[source.entry.dtype]
    cover = source.cover()
    target = out[_within(source.box, box)]
    is_alike = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    if is_alike and cover.box == source.box:
        source.read(_bytes_of(target))
        return target.numel()
    for part in in_parts(cover.box, _SCRATCH // dtype.itemsize):
        shared = intersection(part, source.box)
        if shared:
            scratch = torch.empty(part.size, dtype=dtype)
            source._replace(box=part).read(_bytes_of(scratch))
            with torch.no_grad():
                out[_within(shared, box)].copy_(scratch[_within(shared, part)])
    return target.numel()


def _within(box: Box, container: Box) -> tuple[slice, ...]:
    """Where a box lies in one that contains it."""
    return Box(tuple(a - b for a, b in zip(box.offset, container.offset, strict=True)), box.size).slices


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host that lies in one piece."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def in_parts(box: Box, most: int) -> Iterator[Box]:
    """Cut a box into parts of at most so many elements, each in one piece where the box is."""
    if math.prod(box.size) <= most:
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.size) if size > 1)
    rows = max(1, most // math.prod(box.size[dim + 1 :]))
    for start in range(0, box.size[dim], rows):
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        size = (*box.size[:dim], min(rows, box.size[dim] - start), *box.size[dim + 1 :])
        yield from in_parts(Box(offset, size), most)


def _lies_in(box: Box, shape: tuple[int, ...]) -> bool:
    if not len(box.offset) == len(box.size) == len(shape):
        return False
    return all(min(o, n) >= 0 and o + n <= full for o, n, full in zip(*box, shape, strict=True))


def _decoded(raw: bytes, path: Path) -> Manifest:
    try:
        return decode(raw)
    except ValueError as error:
        raise corrupt(path / MANIFEST, str(error)) from error
