"""What a conversion has found: keys of the run file, and what has no equivalent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import yaml

# What a run file must hold and no training library's configuration tells.
_YOURS = {
    "task": "causal_lm",
    "model": {"name": "my_code:make_model"},
    "data": {"name": "my_code:make_data"},
}


_Kind = TypeVar("_Kind")


@dataclass
class Found:
    """A run file in the making.

    Attributes:
        kind: What was converted.
        values: The run file's values, nested.
        notes: What was decided on the way, a line each.
        left: Keys without an equivalent, each with the reason.
    """

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of the run file."""
        *sections, last = key.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def get(self, key: str) -> Any:
        """The value of a dotted key; None where it has none."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def leave(self, key: str, reason: str) -> None:
        """Note a key that has no equivalent."""
        self.left[key] = reason

    def whole(self) -> dict[str, Any]:
        """The run file, with places for what only its owner knows."""
        values: dict[str, Any] = {}
        for key, yours in _YOURS.items():
            held = self.values.get(key)
            values[key] = {**yours, **held} if isinstance(held, dict) and isinstance(yours, dict) else held or yours
        values["train"] = {"steps": 1000} if not _has_length(self.values) else self.values["train"]
        if not _has_length(self.values):
            values["train"] = {**self.values.get("train", {}), "steps": 1000}
        return {**values, **{key: value for key, value in self.values.items() if key not in values}}

    def text(self) -> str:
        """The run file as YAML, with what has no equivalent in comments."""
        yours = [key for key in _YOURS if key not in self.values or key in ("model", "data")]
        if not _has_length(self.values):
            yours.append("train.steps")
        lines = [f"# Made from a configuration of {self.kind}. Yours to fill in: {', '.join(yours)}."]
        lines += [f"# {note}" for note in self.notes]
        if self.left:
            lines.append("# Without an equivalent:")
            lines += [f"#   {key}: {reason}" for key, reason in self.left.items()]
        body: str = yaml.safe_dump(self.whole(), sort_keys=False, width=100, default_flow_style=None)
        return "\n".join([*lines, "", body])


def _has_length(values: Mapping[str, Any]) -> bool:
    train = values.get("train", {})
    return "steps" in train or "epochs" in train


class FormError(Exception):
    """A key of another library's file has a value of a form that the library does not take."""

    def __init__(self, key: str, value: Any, form: str) -> None:
        super().__init__(f"{key} is {value!r}, which is no {form}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that counts, and not the word auto."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The section of a key; empty where there is none.

    Raises:
        FormError: Where its value is none.
    """
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise FormError(key, value, "section")
    return value


def read_as(kind: Callable[[Any], _Kind], key: str, value: Any) -> _Kind:
    """A value as int, float, str or bool read it.

    Raises:
        FormError: Where they cannot.
    """
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise FormError(key, value, "number") from None
