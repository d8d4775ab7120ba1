"""Whether all ranks run the same code on the same data with the same run file: found out before anything begins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from bigtrain import named
from bigtrain.dist import World
from bigtrain.errors import SetupError

_OURS = Path(__file__).parents[1]


def check_same(world: World, config: str, fingerprint: str) -> None:
    """Compare what every rank starts with. Every rank must call it.

    Args:
        world: The ranks.
        config: The resolved run file.
        fingerprint: Of the data.

    Raises:
        SetupError: On every rank, naming the rank that differs and in what.
    """
    if world.size == 1:
        return
    mine = {
        "the run file": hash_of(config.encode()),
        "the data": fingerprint,
        "bigtrain's own code": _of_files(_own_files()),
        "your code": _of_files(user_files()),
        "torch": str(torch.__version__),
        "Python": sys.version,
    }
    for rank, theirs in enumerate(of_ranks := world.all_gather_object(mine)):
        wrong = [what for what, value in theirs.items() if value != of_ranks[0][what]]
        if wrong:
            raise SetupError(
                f"rank {rank} starts with other values than rank 0: {', '.join(wrong)} "
                f"{'differs' if len(wrong) == 1 else 'differ'}",
                where=f"rank {rank}",
                remedy="all ranks must see the same files: keep code and data in a folder that all machines share",
            )


def user_files() -> dict[str, Path]:
    """The files of imported modules that are neither installed nor ours, by module."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or not file or not file.endswith(".py") or named.is_installed(file):
            continue
        path = Path(file)
        if not path.is_relative_to(_OURS.parent):
            found[name] = path
    return found


def _own_files() -> dict[str, Path]:
    return {str(path.relative_to(_OURS)): path for path in sorted(_OURS.rglob("*.py"))}


def _of_files(files: Mapping[str, Path]) -> str:
    digest = xxhash.xxh3_128()
    for name, path in files.items():
        digest.update(name.encode() + b"\0")
        try:
            digest.update(path.read_bytes())
        except OSError:  # gone since it was imported
            digest.update(b"?")
    return digest.hexdigest()


def hash_of(data: bytes) -> str:
    """A hash of bytes, as text."""
    return xxhash.xxh3_128_hexdigest(data)
