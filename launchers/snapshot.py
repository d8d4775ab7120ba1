"""The code as it was when a job was submitted: a queued job must not change under its user's feet.

Tracked files and untracked ones that git does not ignore are copied, with the commit and the difference to it. Where
there is no git work tree, nothing is copied, and that is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import SetupError

# Code is small: more than this is data that somebody forgot to ignore.
MOST_BYTES = 256 * 2**20
_OURS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copied code.

    Attributes:
        path: What PYTHONPATH begins with.
        here: The copy that stands for the current directory; None where that was not copied.
        words: What was copied, in a line for the user.
    """

    path: tuple[Path, ...] = ()
    here: Path | None = None
    words: str = ""


def snapshot(target: Path, *, copy: bool = True) -> Snapshot:
    """Copy the code of the current directory, and bigtrain's own where it is developed and not installed.

    Args:
        target: An empty folder or none: each work tree gets a folder in it.
        copy: Whether to copy; otherwise it is only said what would be.

    Raises:
        SetupError: Where there is too much of it.
    """
    here = Path.cwd()
    root, ours = work_tree(here), work_tree(_OURS)
    path: list[Path] = []
    words = f"{here} is in no git work tree: the job uses its code as it is when it starts"
    if root is not None:
        commit, count = _copy(root, target / "code", copy)
        path.append(target / "code" / here.relative_to(root))
        if path[0] != target / "code":
            path.append(target / "code")
        words = f"code: {count} files of {root} at commit {commit[:12] or '(none)'}, uncommitted changes included"
    if ours is not None and ours != root and (ours / "launchers").is_dir():
        _copy(ours, target / "bigtrain", copy)
        path.append(target / "bigtrain")
    return Snapshot(tuple(path), path[0] if root is not None else None, words)


def work_tree(folder: Path) -> Path | None:
    """The git work tree that a folder is part of."""
    if shutil.which("git") is None:
        return None
    found = _git(folder, "rev-parse", "--show-toplevel").decode(errors="surrogateescape").rstrip("\n")
    return Path(found) if found else None


def files_of(root: Path) -> list[Path]:
    """Tracked files that are there, and untracked ones that are not ignored, relative to the work tree."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = dict.fromkeys(os.fsdecode(name) for name in listed.split(b"\0") if name)
    return [Path(name) for name in names if (root / name).is_file() or (root / name).is_symlink()]


def _copy(root: Path, target: Path, copy: bool) -> tuple[str, int]:
    """Copy a work tree, with its commit and difference beside the copy; returns the commit and how many files."""
    files = files_of(root)
    sizes = {path: (root / path).lstat().st_size for path in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise SetupError(
            f"the code in {root} is {sum(sizes.values()) / 2**20:.0f} MB, more than {MOST_BYTES / 2**20:.0f}",
            remedy=f"have git ignore what is no code; the largest file is {largest}",
        )
    commit = _git(root, "rev-parse", "--verify", "HEAD").decode().strip()
    if not copy:
        return commit, len(files)
    target.mkdir(parents=True)
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target / path, follow_symlinks=False)
    target.with_name(f"{target.name}.commit").write_text(commit + "\n")
    target.with_name(f"{target.name}.diff").write_bytes(_git(root, "diff", "--binary", "HEAD") if commit else b"")
    return commit, len(files)


def _git(folder: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else b""
