"""Looking at checkpoints: whether every byte is what was written, what two of them have in common, what is in one.

Nothing here changes a file. Memory is bounded whatever the size of a checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.layout import Key
from bigtrain.checkpoint.manifest import MANIFEST, STATE, shard_name
from bigtrain.checkpoint.reading import CheckpointReader, in_parts
from bigtrain.checkpoint.shard_file import ShardFile, removed
from bigtrain.checkpoint.shards import CHUNK
from bigtrain.errors import CheckpointError, CorruptError, ReadError
from bigtrain.state import BUFFER, WEIGHT, Box, whole

Progress = Callable[[int], None]

_AT_ONCE = 1 << 22  # elements that are compared at once


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: The file.
        problem: What is wrong with it.
        is_damage: Whether it is not what was written; False: it could not be read.
    """

    file: str
    problem: str
    is_damage: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found in a checkpoint.

    Attributes:
        path: Its folder.
        num_files: How many files it has.
        num_bytes: Their length together.
        faults: What is wrong.
        strangers: Files that do not belong to it; they are never read.
    """

    path: Path
    num_files: int
    num_bytes: int
    faults: tuple[Fault, ...]
    strangers: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether every byte is what was written."""
        return not self.faults


def verify(
    path: Path, *, threads: int = 4, progress: Progress = lambda count: None, files: Files = DISK
) -> Verification:
    """Read every byte of a checkpoint and compare lengths and hashes.

    Args:
        path: Its folder.
        threads: How many files are read at once.
        progress: Told how many bytes have been looked at since the last time; by several threads.
        files: The file system.

    Raises:
        CheckpointError: Where there is no such folder, or none any more; damage is returned, not raised.
    """
    path = Path(path)
    try:
        reader = CheckpointReader(path, files)
    except CheckpointError as error:
        if not isinstance(error, CorruptError | ReadError):
            raise
        return Verification(path, 0, 0, (_fault(error),), ())
    shards = reader.manifest.shards
    with ThreadPoolExecutor(threads) as pool:
        checks = [pool.submit(_check_shard, reader, writer, progress, files) for writer in range(len(shards))]
        faults = [fault for check in checks for fault in check.result()]
    if faults and not files.is_folder(path):
        raise removed(path)
    own = {MANIFEST, STATE, *(shard_name(writer) for writer in range(len(shards)))}
    strangers = tuple(name for name in files.names(path) if name not in own)
    num_bytes = sum(shard.num_bytes for shard in shards) + reader.manifest.state[0] + len(reader.manifest.encode())
    return Verification(path, len(own), num_bytes, tuple(faults or _check_cover(reader)), strangers)


def _check_shard(reader: CheckpointReader, writer: int, progress: Progress, files: Files) -> list[Fault]:
    faults: list[Fault] = []
    try:
        shard = ShardFile(reader.path / shard_name(writer), reader.manifest.shards[writer], files)
    except CheckpointError as error:
        return [_fault(error)]
    scratch = memoryview(bytearray(4 * CHUNK))
    for entry in shard.header.entries:
        try:
            shard.check(entry, scratch)
        except CheckpointError as error:
            faults.append(_fault(error))
        progress(entry.num_bytes)
    shard.close()
    return faults


def _check_cover(reader: CheckpointReader) -> Iterator[Fault]:
    """See that the shards together hold every element of every tensor, and nothing else."""
    held: Counter[Key] = Counter()
    for writer in range(reader.num_writers):
        shard = reader.shard(writer)
        for entry in shard.header.entries:
            layout = reader.manifest.tensors.get(entry.key)
            if layout is None or not layout.has_place_for(writer, entry):
                yield Fault(str(shard.path), f"{entry.title} does not fit the manifest", True)
            held[entry.key] += math.prod(entry.box.size)
    reader.close()
    for key, layout in reader.manifest.tensors.items():
        if held[key] != math.prod(layout.shape):
            yield Fault(str(reader.path / MANIFEST), f"the shards do not hold all of {' '.join(key)}", True)


def _fault(error: CheckpointError) -> Fault:
    return Fault(error.where or "", error.problem, isinstance(error, CorruptError))


@dataclass(frozen=True, slots=True)
class Difference:
    """How one thing differs between two checkpoints.

    Attributes:
        kind: "weight", "exp_avg", …, or "hyper".
        name: The parameter or buffer.
        what: In words.
        largest: The largest absolute difference of two elements; None where they cannot be compared.
    """

    kind: str
    name: str
    what: str
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints side by side.

    Attributes:
        num_equal: How many tensors are equal to the last bit.
        differences: The others, and hyperparameters that differ.
    """

    num_equal: int
    differences: tuple[Difference, ...]


def diff(a: Path, b: Path, *, progress: Progress = lambda count: None, files: Files = DISK) -> Comparison:
    """Compare two checkpoints by name: weights, buffers, moments and hyperparameters.

    Raises:
        CheckpointError: Where one of them cannot be read.
    """
    with CheckpointReader(Path(a), files) as ours, CheckpointReader(Path(b), files) as theirs:
        differences = []
        num_equal = 0
        for key in sorted(ours.index.keys() | theirs.index.keys(), key=_weights_first):
            difference = _compare(key, ours, theirs)
            shape, dtype = ours.index.get(key) or theirs.index[key]
            progress(math.prod(shape) * dtype.itemsize)
            if difference:
                differences.append(difference)
            else:
                num_equal += 1
        return Comparison(num_equal, (*differences, *_compare_hyper(ours.hyper, theirs.hyper)))


def _weights_first(key: Key) -> tuple[bool, bool, Key]:
    return key[0] != WEIGHT, key[0] != BUFFER, key


def _compare(key: Key, ours: CheckpointReader, theirs: CheckpointReader) -> Difference | None:
    left, right = ours.index.get(key), theirs.index.get(key)
    if left is None or right is None:
        return Difference(*key, "only in the second" if left is None else "only in the first")
    if left != right:
        return Difference(*key, f"{left.shape} {left.dtype} and {right.shape} {right.dtype}")
    largest, count = 0.0, 0
    for box in in_parts(whole(left.shape), _AT_ONCE) if math.prod(left.shape) else ():
        mine, other = (_read(reader, key, box, left.dtype) for reader in (ours, theirs))
        unequal = (mine.view(-1).view(torch.uint8) != other.view(-1).view(torch.uint8)).view(mine.numel(), -1).any(1)
        if unequal.any():
            count += int(unequal.sum())
            distance = float((mine.view(-1)[unequal].double() - other.view(-1)[unequal].double()).abs().max())
            largest = max(largest, distance) if not math.isnan(distance) else math.nan
    return Difference(*key, f"{count:,} of {math.prod(left.shape):,} elements differ", largest) if count else None


def _read(reader: CheckpointReader, key: Key, box: Box, dtype: torch.dtype) -> Tensor:
    out = torch.empty(box.size, dtype=dtype)
    reader.read_into(*key, box, out)
    return out


def _compare_hyper(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    for name in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(name), theirs.get(name)
        if left is None or right is None:
            yield Difference("hyper", name, "only in the second" if left is None else "only in the first")
            continue
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                yield Difference("hyper", name, f"{key} is {left.get(key)!r} and {right.get(key)!r}")


@dataclass(frozen=True, slots=True)
class Description:
    """What is in a checkpoint.

    Attributes:
        path: Its folder.
        step: How many steps had been taken.
        num_writers: How many ranks wrote it.
        num_tensors: How many tensors it has, by kind.
        num_elements: How many elements they have, by kind.
        num_parameters: How many weights there are.
        num_bytes: The length of all files.
        extra: What else was kept.
    """

    path: Path
    step: int
    num_writers: int
    num_tensors: dict[str, int]
    num_elements: dict[str, int]
    num_parameters: int
    num_bytes: int
    extra: dict[str, Any]


def describe(path: Path, *, files: Files = DISK) -> Description:
    """Say what is in a checkpoint, from its manifest and state.json alone.

    Raises:
        CheckpointError: Where they cannot be read.
    """
    with CheckpointReader(Path(path), files) as reader:
        elements: Counter[str] = Counter()
        for (kind, _), spec in reader.index.items():
            elements[kind] += math.prod(spec.shape)
        shards = sum(shard.num_bytes for shard in reader.manifest.shards)
        return Description(
            path=reader.path,
            step=reader.step,
            num_writers=reader.num_writers,
            num_tensors=dict(Counter(kind for kind, _ in reader.index)),
            num_elements=dict(elements),
            num_parameters=elements[WEIGHT],
            num_bytes=shards + reader.manifest.state[0] + len(reader.manifest.encode()),
            extra=reader.extra,
        )
