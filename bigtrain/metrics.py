"""Numbers as JSON that reads back to the last bit, those that JSON does not know included; which of two is better.

This module does not import torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_BETTER_WHEN_SMALL = ("loss", "perplexity", "mse", "mae", "rmse", "error")
_BETTER_WHEN_LARGE = ("accuracy", "precision", "recall", "f1", "r2", "auc", "score")
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def to_json(value: Any) -> Any:
    """The same value with words for the numbers that JSON does not know: nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


class Row(dict[str, Any]):
    """A row that nobody changes any more, so that its line is written once for all who want it."""

    line: bytes | None = None


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON in UTF-8, its end included."""
    if not isinstance(row, Row):
        return _line(row)
    if row.line is None:
        row.line = _line(dict(row))  # json takes longer for anything but a plain dict
    return row.line


def first_of(lines: Iterable[bytes], num_bytes: int = 65536) -> bytes:
    """The first of these lines in one, as many as it takes to have so many bytes."""
    taken, size = [], 0
    for line in lines:
        taken.append(line)
        size += len(line)
        if size >= num_bytes:
            break
    return b"".join(taken)


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        text = _ENCODER.encode(row)
    except (TypeError, ValueError):  # seldom: something that JSON does not know
        text = _ENCODER.encode(to_json(row))
    return text.encode(errors="backslashreplace") + b"\n"  # half a surrogate is written as JSON escapes it


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def is_score(name: str) -> bool:
    """Whether a metric of this name tells how good a model is, and not, say, how much was measured."""
    return name.startswith("eval/") and name != "eval/tokens"


def is_better_when_small(name: str) -> bool:
    """Whether a metric of this name is the better the smaller it is."""
    return any(word in name for word in _BETTER_WHEN_SMALL)


def is_better_when_large(name: str) -> bool:
    """Whether a metric of this name is known to be the better the larger it is."""
    return any(word in name for word in _BETTER_WHEN_LARGE) and not is_better_when_small(name)
