"""`bigtrain doctor`: whether this machine is fit for training, and what to do where it is not.

Each check is a function that returns findings; none changes anything. They take some ten seconds together, most of it
for two processes that really add numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bigtrain.doctor import machine, software
from bigtrain.doctor.findings import ERROR, OK, WARNING, Finding

__all__ = ["ERROR", "OK", "WARNING", "Finding", "examine"]


def examine(folder: Path, nproc: int) -> list[Finding]:
    """Look at everything.

    Args:
        folder: Where run folders are to lie.
        nproc: How many processes are to run here.
    """
    checks: Sequence[Callable[[], list[Finding]]] = (
        software.versions,
        software.gpus,
        lambda: machine.cores(nproc),
        lambda: machine.shared_memory(nproc),
        machine.open_files,
        machine.ports,
        lambda: machine.disk(folder),
        software.all_reduce,
    )
    return [finding for check in checks for finding in _safely(check)]


def _safely(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that cannot be made is a finding, too: the others are made all the same."""
    try:
        return check()
    except Exception as error:
        name = getattr(check, "__name__", "check")
        return [
            Finding(WARNING, name, f"could not be looked at: {type(error).__name__}: {error}", "look at it yourself")
        ]
