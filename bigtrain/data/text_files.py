"""Which files are the documents of a text source."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path

from bigtrain.data.paths import missing
from bigtrain.errors import DataError

STDLIB = "python-stdlib"
# Tests and what was installed beside the library differ from machine to machine more than the library does.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_documents(source: str, *, where: str) -> list[Path]:
    """The files of a text source, in an order that is the same on every machine.

    Args:
        source: A file; a folder, for every file in it and below except hidden ones; a pattern with `*`, `?`
            or `**`; or `python-stdlib`, for the source code of Python's standard library.
        where: The key of the run file, for errors.

    Raises:
        DataError: If there are no such files.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _sorted(path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts))
    path = Path(source).expanduser()
    if has_magic(source) and not path.exists():
        documents = _sorted(match for name in glob(str(path), recursive=True) if (match := Path(name)).is_file())
    elif path.is_dir():
        documents = _sorted(
            file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))
        )
    elif path.is_file():
        return [path]
    else:
        raise missing(path, f"a file, a folder, a pattern or {STDLIB!r}", where=where)
    if not documents:
        raise DataError(
            f"{source!r} matches no files",
            where=where,
            remedy=f"give a file, a folder, a pattern or {STDLIB!r}",
        )
    return documents


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.as_posix())
