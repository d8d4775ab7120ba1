"""What our own models ask of their arguments: a wrong one is refused by its name in the run file."""

from __future__ import annotations

from bigtrain.errors import ModelError


def check_positive(**sizes: object) -> None:
    """Refuse sizes that are not whole numbers of at least 1.

    Raises:
        ModelError: Naming the argument.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            where = f"model.args.{name}"
            raise ModelError(f"{name} is {size!r}", where=where, remedy="give a whole number of at least 1")


def check_share(**shares: object) -> None:
    """Refuse shares that are not numbers from 0 up to, but not including, 1.

    Raises:
        ModelError: Naming the argument.
    """
    for name, share in shares.items():
        if not isinstance(share, int | float) or not 0 <= share < 1:
            remedy = "give a share: 0 or more, and less than 1"
            raise ModelError(f"{name} is {share!r}", where=f"model.args.{name}", remedy=remedy)
