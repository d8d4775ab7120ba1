"""The best checkpoint of a run, found by looking: there is no pointer that could be wrong.

Every checkpoint tells after which step the best evaluation was that its run had seen: the newest that can be read
knows. Where the checkpoint of that step is damaged or gone, no other one is taken for it.
"""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.folders import find, folder_of
from bigtrain.checkpoint.reading import CheckpointReader
from bigtrain.errors import CheckpointError
from bigtrain.runs import instead_of, run_at


def find_best(folder: Path, files: Files = DISK) -> Path | None:
    """The best checkpoint, which may be damaged; None where none is known to be, or where it is not there.

    Args:
        folder: Where a run's checkpoints lie.
        files: The file system.
    """
    step = _best_step(folder, files)
    path = None if step is None else folder_of(folder, step)
    return path if path and files.is_folder(path) else None


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
        step = _best_step(folder, DISK)
        if step is not None:
            raise CheckpointError(
                f"the best checkpoint of {place} was that of step {step}, which is not there",
                where=str(folder),
                remedy="give one that is there by its folder; or take the newest, without --best",
            )
    raise CheckpointError(
        f"{place} has no checkpoint that is known to be the best",
        where=str(place),
        remedy="a run keeps its best where checkpoint.keep_best says by what; without --best its newest is taken",
    )


def _best_step(folder: Path, files: Files) -> int | None:
    """After which step the best evaluation was; None where no checkpoint tells. What cannot be read is passed over."""
    for path in find(folder, files):
        try:
            with CheckpointReader(path, files) as reader:
                standings = reader.extra.get("standings")
        except CheckpointError:
            continue
        best = standings.get("best") if isinstance(standings, dict) else None
        if isinstance(best, dict) and best.get("value") is not None and isinstance(best.get("step"), int):
            return int(best["step"])
    return None
