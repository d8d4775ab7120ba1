"""Going on from the newest good checkpoint, which all ranks must see alike.

Rank 0 chooses the step and tells the others its manifest's hash; they wait for exactly that, since shared file
systems show old listings. A damaged file that any rank finds is damaged for all: they take the checkpoint before,
loudly, and the damaged one is renamed once a good one has been loaded. If there is none, that is an error which lists
every bad file, and nothing is renamed: a run that has checkpoints never starts from nothing in silence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.folders import named, set_aside, those_set_aside
from bigtrain.checkpoint.layout import Key
from bigtrain.checkpoint.ranks import Ranks
from bigtrain.checkpoint.reading import CheckpointReader
from bigtrain.errors import CheckpointError, CorruptError, NoGoodError, ReadError
from bigtrain.state import Box, Reader, TensorSpec, whole

_log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.2


class Opener(Protocol):
    """Opens a checkpoint; `CheckpointReader` is one."""

    def __call__(self, path: Path, files: Files) -> CheckpointReader:
        """The checkpoint at a path."""


def load_newest(
    ranks: Ranks,
    folder: Path,
    load: Callable[[Reader], None],
    *,
    fall_back: bool = True,
    at_most: int = 3,
    wait_s: float = 60.0,
    files: Files = DISK,
    opened: Opener = CheckpointReader,
) -> CheckpointReader | None:
    """Load the newest good checkpoint. Every rank must call it.

    Args:
        ranks: Who loads.
        folder: Where checkpoints lie.
        load: Fills this rank's state, and may communicate; the reader has `extra`, too. After one that failed it is
            called again with another reader, and must not mind what the first left behind.
        fall_back: Whether a damaged checkpoint may be passed over.
        at_most: How many may.
        wait_s: How long a rank waits to see what rank 0 sees.
        files: The file system.
        opened: Opens a checkpoint.

    Returns:
        What was loaded, open; None where there is no checkpoint and never was a damaged one.

    Raises:
        NoGoodError: Where there are checkpoints, and none that can be loaded.
        CorruptError: Where the newest is damaged and may not be passed over.
        ReadError: Where an I/O error stayed.
    """
    found = _look(ranks, Path(folder), files)
    bad: dict[Path, list[str]] = {}
    for path in found[: at_most + 1]:
        reader, failures = _try(ranks, path, load, wait_s, files, opened)
        if reader:
            _say_and_set_aside(ranks, bad, path, files)
            return reader
        bad[path] = [f"{error.problem} (rank {rank})" for rank, error in failures.items()]
        if not fall_back:
            error = next(iter(failures.values()))
            error.remedy = error.remedy or "allow falling back, or restore the file"
            raise error
    if bad:
        raise _none_is_good(bad, len(found) - len(bad))
    return None


def _look(ranks: Ranks, folder: Path, files: Files) -> list[Path]:
    """What rank 0 sees."""

    def look() -> tuple[list[Path], list[Path]]:
        if not ranks.is_main:
            return [], []
        found: list[Path] = []
        for path in named(folder, files):
            if files.is_folder(path):
                found.append(path)
            elif not found:
                raise CheckpointError(
                    f"{path} is a link or a file, which is not followed: the run would go back behind it in silence",
                    where=str(folder),
                    remedy="put the folder itself there; or take it away, and the run goes on from what is left",
                )
        return found, those_set_aside(folder, files)

    found, aside = ranks.broadcast(ranks.agree(look, ReadError))
    if aside and not found:
        raise NoGoodError(
            f"all checkpoints of this run are damaged and were set aside: {', '.join(path.name for path in aside)}",
            where=str(folder),
            remedy="restore one and give it its name back; or remove them to start from nothing",
        )
    return list(found)


def _try(
    ranks: Ranks, path: Path, load: Callable[[Reader], None], wait_s: float, files: Files, opened: Opener
) -> tuple[CheckpointReader | None, dict[int, CheckpointError]]:
    """Load one checkpoint on all ranks: the reader, or what is damaged by the rank that found it."""
    reader, failure = ranks.attempt(lambda: opened(path, files) if ranks.is_main else None, ReadError)
    seen = ranks.broadcast(reader.manifest_hash if reader else None)
    if seen and not ranks.is_main:
        reader, failure = ranks.attempt(lambda: _await(path, seen, wait_s, files, opened), ReadError)
    failures = _damage(ranks, failure)
    if failures or not reader:
        return None, failures
    guarded, failure = ranks.attempt(lambda: _Guarded(reader, ranks), ReadError)
    failures = _damage(ranks, failure)
    if not failures and guarded:
        load(guarded)
        failures = _damage(ranks, guarded.failure)
    if failures:
        reader.close()
        return None, failures
    return reader, {}


def _damage(ranks: Ranks, failure: CheckpointError | None) -> dict[int, CheckpointError]:
    """The damage that ranks found. Every rank must call it.

    Raises:
        CheckpointError: What any rank met that is no damage.
    """
    failures = {rank: error for rank, error in enumerate(ranks.gather(failure)) if error}
    for error in failures.values():
        if not isinstance(error, CorruptError):
            raise error
    return failures


def _await(path: Path, manifest_hash: str, wait_s: float, files: Files, opened: Opener) -> CheckpointReader:
    """Open what rank 0 has opened, as soon as it is seen here.

    Raises:
        ReadError: Where it is not: that says nothing about the checkpoint.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            reader = opened(path, files)
            if reader.manifest_hash == manifest_hash:
                return reader
            reader.close()
            problem = "another manifest than rank 0"
        except CheckpointError as error:
            problem = error.problem
        if time.monotonic() > deadline:
            raise ReadError(
                f"after {wait_s:g} s this rank does not see {path} as rank 0 does: {problem}",
                where=str(path),
                remedy="see that all machines share run.dir",
            )
        files.pause(_LOOK_AGAIN_S)


class _Guarded:
    """A reader that never fails while the ranks load: one that stopped would leave the others in a collective.

    Lengths and headers are verified before, of each file by one rank, and numbers of no dimension (step counters,
    which engines compare) are read before. Of the rest the first failure is kept, and what is read after it is left
    as it was.
    """

    def __init__(self, reader: CheckpointReader, ranks: Ranks) -> None:
        self.failure: CheckpointError | None = None
        self.hyper: Mapping[str, Mapping[str, Any]] = reader.hyper
        self.index: Mapping[Key, TensorSpec] = reader.index
        self.extra: Mapping[str, Any] = reader.extra
        self._reader = reader
        for writer in range(ranks.rank, reader.num_writers, ranks.size):
            reader.shard(writer)
        self._scalars: dict[Key, Tensor] = {}
        for (kind, name), spec in reader.index.items():
            if not spec.shape:
                self._scalars[kind, name] = torch.empty((), dtype=spec.dtype)
                reader.read_into(kind, name, whole(()), self._scalars[kind, name])

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor, as long as nothing has failed."""
        if (kind, name) in self._scalars:
            with torch.no_grad():
                out.copy_(self._scalars[kind, name])
        elif self.failure is None:
            try:
                self._reader.read_into(kind, name, box, out)
            except CheckpointError as error:
                self.failure = error


def _say_and_set_aside(ranks: Ranks, bad: Mapping[Path, Sequence[str]], taken: Path, files: Files) -> None:
    if not ranks.is_main:
        return
    for path, problems in bad.items():
        _log.warning("%s is damaged; going on from %s instead: %s", path, taken.name, "; ".join(problems))
        try:
            _log.warning("renamed %s to %s", path.name, set_aside(path, files).name)
        except OSError as error:
            _log.warning("%s cannot be renamed and will be in the way of its step: %s", path, error)


def _none_is_good(bad: Mapping[Path, Sequence[str]], num_left: int) -> NoGoodError:
    lines = [f"{path}: {problem}" for path, problems in bad.items() for problem in problems]
    left = f"; {num_left} older ones were not tried" if num_left else ""
    return NoGoodError(
        f"the newest {len(bad)} checkpoints are damaged{left}:\n  " + "\n  ".join(lines),
        remedy="restore one of these files; or remove the damaged folders, and the run goes on from what is left",
    )
