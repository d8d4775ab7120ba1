"""The best checkpoint of a run, found by looking: there is no pointer that could be wrong.

Every checkpoint tells after which step the best evaluation was that its run had seen. One that names its own step was
the best when it was saved, and the newest of these is the best of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.folders import find
from bigtrain.checkpoint.reading import CheckpointReader
from bigtrain.errors import CheckpointError
from bigtrain.runs import instead_of, run_at


def find_best(folder: Path, files: Files = DISK) -> Path | None:
    """The best committed checkpoint; None where none is known to be. What cannot be read is passed over.

    Args:
        folder: Where a run's checkpoints lie.
        files: The file system.
    """
    for path in find(folder, files):
        try:
            with CheckpointReader(path, files) as reader:
                if was_best(reader.extra, reader.step):
                    return path
        except CheckpointError:
            continue
    return None


def best_of(place: Path) -> Path:
    """The best checkpoint of a run's folder, or of a folder of checkpoints.

    Raises:
        CheckpointError: Where none is known to be.
    """
    if not DISK.exists(place):
        raise CheckpointError(
            f"there is no folder {place}",
            where=str(place),
            remedy=instead_of(run_at(place), "give a run's folder, as runs/NAME, or one of checkpoints"),
        )
    for folder in (place / "checkpoints", place):
        found = find_best(folder)
        if found:
            return found
    raise CheckpointError(
        f"{place} has no checkpoint that is known to be the best",
        where=str(place),
        remedy="a run keeps its best where checkpoint.keep_best says by what; without --best its newest is taken",
    )


def was_best(extra: Mapping[str, Any], step: int) -> bool:
    """Whether a checkpoint was the best of its run when it was saved."""
    standings = extra.get("standings")
    best = standings.get("best") if isinstance(standings, dict) else None
    return isinstance(best, dict) and best.get("value") is not None and best.get("step") == step
