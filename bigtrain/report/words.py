"""Numbers, times and sizes as people read them, and HTML that holds what it is given as text."""

from __future__ import annotations

import html
import math
from datetime import datetime

_SIZES = ("B", "kB", "MB", "GB", "TB")


def escape(text: object) -> str:
    """Text for HTML, in an attribute as well; bytes of a file's name that are no text are shown as ?."""
    return html.escape(str(text).encode(errors="replace").decode(), quote=True)


def number(value: float) -> str:
    """A number with four digits that count."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3e}"
    if size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2e}"


def short(value: float) -> str:
    """A number for an axis: 20k, 1.5M, 0.001."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def num_bytes(value: float) -> str:
    """A size in bytes."""
    for unit in _SIZES[:-1]:
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_SIZES[-1]}"


def seconds(value: float) -> str:
    """How long something takes."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def moment(time: float) -> str:
    """A date and time of day, where this runs."""
    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def count(value: int, what: str) -> str:
    """A number of things."""
    return f"{value:,} {what}{'' if value == 1 else 's'}"
