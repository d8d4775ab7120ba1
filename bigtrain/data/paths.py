"""Errors about paths that say where the path stops being right."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from bigtrain.errors import DataError
from bigtrain.named import nearest


def missing(path: Path, expected: str, *, where: str) -> DataError:
    """The error for a path that does not exist: it names the nearest parent that does, and what lies in it.

    A folder where a file should be, or a file where a folder, is said to be that.

    Args:
        path: What was looked for.
        expected: What should be there, in a few words.
        where: The key of the run file.
    """
    if path.exists():
        kind = "folder" if path.is_dir() else "file"
        return DataError(f"{str(path)!r} is a {kind}", where=where, remedy=f"give {expected}")
    full = path.absolute()
    parent = next(parent for parent in full.parents if parent.is_dir())
    wanted = full.relative_to(parent).parts[0]
    names = sorted(child.name for child in islice(parent.iterdir(), 1000))
    near = nearest(wanted, names) or names[:5]
    holds = f", which holds {', '.join(near)}{', …' if len(names) > len(near) else ''}" if names else ", which is empty"
    return DataError(
        f"there is no {str(path)!r}",
        where=where,
        remedy=f"give {expected}; the path is right up to {parent}{holds}",
    )
