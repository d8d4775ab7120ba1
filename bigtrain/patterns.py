"""Shell-style patterns over parameter names, strict: a pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from bigtrain.errors import PatternError


def match_names(patterns: Sequence[str], names: Sequence[str], *, where: str, what: str = "parameter") -> list[str]:
    """The names that any of the patterns matches, in their own order.

    Args:
        patterns: As in a shell: `*` matches any characters, dots included.
        names: What they may match.
        where: The key of the run file, for the message.
        what: What the names are of.

    Raises:
        PatternError: Where a pattern matches nothing; it lists names that look alike.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise PatternError(
                f"the pattern {pattern!r} matches no {what}",
                where=where,
                remedy=f"names that look alike: {', '.join(near)}",
            )
        matched.update(hits)
    return [name for name in names if name in matched]
