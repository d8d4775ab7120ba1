"""What the doctor says."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ok, warning (it will do, but), or error (it will fail).
        what: The thing.
        text: How it is.
        remedy: What to do; empty where nothing has to be done.
    """

    level: str
    what: str
    text: str
    remedy: str = ""
