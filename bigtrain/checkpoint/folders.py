"""How the folders of checkpoints are named, which of them count, and which are taken away.

    step-00000100               committed, if it holds a manifest
    step-00000100.tmp-<attempt> being written, or left behind by a writer that was killed
    step-00000100.bad           set aside: something in it is not what was written

Whatever else lies there is left alone. There is no pointer to the latest: it is found by looking.
"""

from __future__ import annotations

import re
from pathlib import Path

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.manifest import MANIFEST

_STEP = re.compile(r"step-(\d{8,18})")
_LEFT = re.compile(r"step-\d{8,18}\.tmp-[^/]*")
_BAD = re.compile(r"step-\d{8,18}\.bad[^/]*")


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def temporary_of(folder: Path, step: int, attempt: str) -> Path:
    """Where it lies while it is written.

    Raises:
        ValueError: Where the attempt cannot be part of a name.
    """
    if not re.fullmatch(r"[\w.-]+", attempt):
        raise ValueError(f"the attempt {attempt!r} is not a word")
    return folder / f"step-{step:08d}.tmp-{attempt}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder, by its name; None where it is not the name of one."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found and folder_of(path.parent, int(found[1])) == path else None


def candidates(folder: Path, files: Files = DISK) -> list[Path]:
    """Every folder that is named like a checkpoint, whatever is in it, the newest first; links are none."""
    return [path for path in named(folder, files) if files.is_folder(path)]


def named(folder: Path, files: Files = DISK) -> list[Path]:
    """Whatever has the name of a checkpoint, the newest first: a link, too, which is not followed."""
    steps = {path: step for name in files.names(folder) if (step := step_of(path := folder / name)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def find(folder: Path, files: Files = DISK) -> list[Path]:
    """The committed checkpoints, the newest first."""
    folder = Path(folder)
    return [path for path in candidates(folder, files) if files.exists(path / MANIFEST)]


def newest(folder: Path, files: Files = DISK) -> Path | None:
    """The newest checkpoint, whatever is wrong with it: an older one must not be taken for it in silence."""
    return next(iter(named(Path(folder), files)), None)


def set_aside(path: Path, files: Files = DISK) -> Path:
    """Rename a checkpoint so that it counts no more. Only rank 0 may call it."""
    number = 1
    aside = path.with_name(f"{path.name}.bad")
    while files.exists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.bad-{number}")
    files.rename(path, aside)
    files.sync_folder(path.parent)
    return aside


def those_set_aside(folder: Path, files: Files = DISK) -> list[Path]:
    """The checkpoints that were set aside."""
    return [folder / name for name in files.names(folder) if _BAD.fullmatch(name)]


def prune(
    folder: Path,
    keep: int | None,
    keep_every: int | None = None,
    *,
    stays: Path | None = None,
    files: Files = DISK,
) -> list[Path]:
    """Remove old checkpoints, and what writers that were killed left behind. Only rank 0 may call it, after a commit.

    Args:
        folder: Where checkpoints lie.
        keep: How many of the newest stay; at least two do. None: all.
        keep_every: Those whose step is a multiple of this stay for good.
        stays: One that stays in any case: the best.
        files: The file system.

    Returns:
        What was removed.
    """
    folder = Path(folder)
    left = [folder / name for name in files.names(folder) if _LEFT.fullmatch(name)]
    committed = find(folder, files)
    old = [] if keep is None else committed[max(keep, 2) :]
    old = [path for path in old if path != stays and not (keep_every and (step_of(path) or 0) % keep_every == 0)]
    for path in old:
        # Half removed, it must not look like a checkpoint.
        gone = path.with_name(f"{path.name}.tmp-removed")
        files.remove_tree(gone)
        files.rename(path, gone)
        left.append(gone)
    for path in dict.fromkeys(left):
        files.remove_tree(path)
    return old
