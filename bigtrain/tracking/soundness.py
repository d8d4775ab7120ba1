"""Whether what a run's files hold is what a run writes: a disk, an editor or another program may have changed it.

What is not is left out, and said: a list of runs or a report of one is made of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LARGEST_STEP = 2**63 - 1  # what an array of steps holds
_MOST_VALUES = 100_000
_DEEPEST = 64

_NUMBER, _COUNT = (int, float), (int,)
# Other keys of a row are metrics, which are taken where they are numbers.
_ROW = {"time": _NUMBER, "step_s": _NUMBER}
_EVENT = {
    "event": (str,),
    "text": (str,),
    "world_size": _COUNT,
    "attempt": _COUNT,
    "bytes": _NUMBER,
    "seconds": _NUMBER,
}
_RESULT = {
    **dict.fromkeys(("steps", "samples", "skipped_steps", "world_size"), _COUNT),
    "engine": (str,),
    "metrics": (dict,),
    "best": (dict,),
    "class_names": (list,),
    "stopped_early": (bool,),
}
_BEST = {"metric": (str,), "value": (*_NUMBER, type(None)), "step": _COUNT}


def is_row(row: Any) -> bool:
    """Whether a line of metrics.jsonl is a row of numbers or an event."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and 0 <= row["step"] <= _LARGEST_STEP
        and _fits(row, _ROW)
        and ("event" not in row or _fits(row, _EVENT))
    )


def sound_result(result: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What a result.json says as far as it is of the types that a run writes.

    Args:
        result: The file's mapping.
        problems: What is left out is said here, a line each.
    """
    wrong = [name for name in result if not _fits(result, {name: _RESULT.get(name, (object,))})]
    best, metrics = result.get("best"), result.get("metrics")
    if isinstance(best, dict) and not (best.keys() >= _BEST.keys() and _fits(best, _BEST)):
        wrong.append("best")
    sound = {name: value for name, value in result.items() if name not in wrong}
    if isinstance(metrics, dict) and not _is_square(metrics.get("confusion_matrix", [])):
        wrong.append("metrics.confusion_matrix")
        sound["metrics"] = {name: value for name, value in metrics.items() if name != "confusion_matrix"}
    problems += [f"{name} in result.json is damaged and left out" for name in wrong]
    return sound


def is_tree(value: Any) -> bool:
    """Whether a value of YAML ends: by its aliases it may hold itself, or be larger than any memory."""
    count, level = 0, [value]
    for _ in range(_DEEPEST):
        inner = [item for held in level for item in _inside(held)]
        count += len(inner)
        if not inner:
            return True
        if count > _MOST_VALUES:
            return False
        level = inner
    return False


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _fits(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> bool:
    """Whether values that are there are of their kinds; a bool is no number."""
    for name, kind in kinds.items():
        if name in values:
            value = values[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind in (_NUMBER, _COUNT)):
                return False
    return True


def _is_square(matrix: Any) -> bool:
    return isinstance(matrix, list) and all(
        isinstance(row, list) and len(row) == len(matrix) and all(type(count) is int for count in row) for row in matrix
    )
