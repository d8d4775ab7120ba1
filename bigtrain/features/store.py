"""Features on the disk: raw arrays, a file for each part of a sample and rank, and a manifest that is written last.

    <folder>/<key>/manifest.json        shapes, dtypes, rows and hash of every file; what the features are of
                   train-0-00000.bin    the features that rank 0 made, row after row
                   train-1-00000.bin    the labels beside them
                   eval-0-00000.bin     …

The key is made of all that features follow from. A cache that is not whole is none: lengths and hashes are compared
before a row is used, each rank a share of the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from bigtrain.checkpoint.files import DISK, Files, Output
from bigtrain.data.features import INTEGERS, Column, Features

MANIFEST = "manifest.json"
_VERSION = 1
_LARGEST_MANIFEST = 16 << 20
_CHUNK = 16 << 20
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


@dataclass(frozen=True)
class Shard:
    """What one rank wrote of a split.

    Attributes:
        rows: How many samples.
        columns: For each part of a sample: its shape, its dtype's name, and the hash of its file.
    """

    rows: int
    columns: list[tuple[list[int], str, str]]


@dataclass
class ShardWriter:
    """Writes one rank's part of a split.

    Attributes:
        folder: Where.
        split: train or eval.
        rank: This rank.
        files: The file system.
    """

    folder: Path
    split: str
    rank: int
    files: Files = DISK
    rows: int = 0
    _open: list[tuple[Output, Any, list[int], str]] = field(default_factory=list)

    def add(self, parts: Sequence[Tensor]) -> None:
        """Add samples, given as tensors with samples first."""
        kept = [part.detach().contiguous().cpu() for part in parts]
        if not self._open:
            self.files.make_folder(self.folder)
            for number, part in enumerate(kept):
                file = self.files.create(self.folder / _name(self.split, number, self.rank))
                dtype = str(part.dtype).removeprefix("torch.")
                self._open.append((file, xxhash.xxh3_128(), list(part.shape[1:]), dtype))
        for part, (file, digest, shape, dtype) in zip(kept, self._open, strict=True):
            if [*part.shape[1:]] != shape or str(part.dtype) != f"torch.{dtype}":
                raise ValueError(f"samples differ in shape: {tuple(part.shape[1:])} and {tuple(shape)}")
            view: memoryview = part.view(-1).view(torch.uint8).numpy().data
            file.write([view], self.rows * part[:1].nbytes)
            digest.update(view)
        self.rows += len(kept[0])

    def finish(self) -> Shard:
        """Put everything on the disk."""
        for file, *_ in self._open:
            file.sync()
            file.close()
        return Shard(self.rows, [(shape, dtype, digest.hexdigest()) for _, digest, shape, dtype in self._open])


def commit(folder: Path, key: str, about: dict[str, Any], splits: dict[str, list[Shard]], files: Files = DISK) -> None:
    """Write the manifest, which makes a cache of the files that lie there. Only rank 0 may call it."""
    listed = {name: [[shard.rows, shard.columns] for shard in shards] for name, shards in splits.items()}
    content = {"format": "bigtrain features", "version": _VERSION, "key": key, "about": about, "splits": listed}
    text = _text(content)
    whole = json.dumps({"xxh3_128": xxhash.xxh3_128_hexdigest(text.encode()), "content": content}, indent=1)
    files.write_whole(folder / MANIFEST, whole.encode())
    files.sync_folder(folder)


@dataclass(frozen=True)
class Cache:
    """A cache whose manifest is right.

    Attributes:
        folder: Where it lies.
        splits: What every rank wrote of each split.
    """

    folder: Path
    splits: dict[str, list[Shard]]

    def problems(self, rank: int, world_size: int, files: Files = DISK) -> list[str]:
        """Read this rank's share of the files, and say what is wrong with them."""
        every = [
            (self.folder / _name(split, column, number), shard.rows, described)
            for split, shards in self.splits.items()
            for number, shard in enumerate(shards)
            for column, described in enumerate(shard.columns)
        ]
        return [word for each in every[rank::world_size] if (word := _problem(*each, files))]

    def samples(self, split: str, class_names: Sequence[str] | None) -> Features:
        """The samples of a split; their files are mapped, and read when they are asked for."""
        columns = []
        written = [(number, shard) for number, shard in enumerate(self.splits[split]) if shard.rows]
        for column, (shape, dtype, _) in enumerate(written[0][1].columns):
            kind = INTEGERS[_DTYPES[dtype].itemsize]
            paths = [self.folder / _name(split, column, number) for number, _ in written]
            rows = [(shard.rows, *shape) for _, shard in written]
            mapped = [_mapped(path, kind, shape) for path, shape in zip(paths, rows, strict=True)]
            columns.append(Column(_DTYPES[dtype], mapped))
        return Features(columns, class_names)


def open_cache(folder: Path, key: str, lengths: dict[str, int], files: Files = DISK) -> Cache:
    """Read a cache's manifest.

    Args:
        folder: Where it lies.
        key: What it must be of.
        lengths: How many samples each split must have.
        files: The file system.

    Raises:
        ValueError: What is wrong.
        OSError: Where it cannot be read.
    """
    with files.open(folder / MANIFEST) as file:
        if file.size > _LARGEST_MANIFEST:
            raise ValueError("its manifest is impossibly large")
        raw = bytearray(file.size)
        file.read(0, memoryview(raw))
    try:
        found = json.loads(raw)
        content = found["content"]
        if found["xxh3_128"] != xxhash.xxh3_128_hexdigest(_text(content).encode()):
            raise ValueError("its manifest is not what was written")
        if (content["format"], content["version"], content["key"]) != ("bigtrain features", _VERSION, key):
            raise ValueError("it is of other weights or data")
        splits = {
            name: [Shard(rows, [tuple(column) for column in columns]) for rows, columns in shards]
            for name, shards in content["splits"].items()
        }
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("its manifest is not what was written") from error
    if {name: sum(shard.rows for shard in shards) for name, shards in splits.items()} != lengths:
        raise ValueError("it has other samples")
    return Cache(folder, splits)


def _problem(path: Path, rows: int, described: tuple[list[int], str, str], files: Files) -> str | None:
    shape, dtype, expected = described
    try:
        with files.open(path) as file:
            wanted = rows * math.prod(shape) * _DTYPES[dtype].itemsize
            if file.size != wanted:
                return f"{path.name} has {file.size:,} bytes of {wanted:,}"
            digest, buffer = xxhash.xxh3_128(), bytearray(min(_CHUNK, wanted))
            for start in range(0, wanted, _CHUNK):
                part = memoryview(buffer)[: min(_CHUNK, wanted - start)]
                file.read(start, part)
                digest.update(part)
            return None if digest.hexdigest() == expected else f"{path.name} is not what was written"
    except Exception as error:  # missing, a link, unreadable: it is not whole
        return f"{path.name}: {type(error).__name__}"


def _mapped(path: Path, kind: Any, shape: tuple[int, ...]) -> Any:
    if not math.prod(shape):
        return np.empty(shape, kind)  # an empty file cannot be mapped
    return np.memmap(path, kind, mode="r", shape=shape)


def _name(split: str, column: int, rank: int) -> str:
    return f"{split}-{column}-{rank:05d}.bin"


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
