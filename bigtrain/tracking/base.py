"""What a tracker is: two methods. This module imports nothing heavy: trackers run in a process without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row; `step` is always among its keys.

        A row holds the numbers of a step (`loss`, `lr`, …), those of an evaluation (`eval/…`), or something that
        happened (`event`, a word, and what belongs to it).
        """

    def close(self) -> None:
        """Write what is left."""


def closing_all(trackers: Iterable[Tracker]) -> ExitStack:
    """Close every one of them in the end, in this order, whatever the others raise."""
    stack = ExitStack()
    for tracker in reversed(list(trackers)):
        stack.callback(tracker.close)
    return stack


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of the run whose rows it takes.

    Attributes:
        path: The run folder.
        name: The run's name.
        config: The resolved run file.
        engine: The engine that trains.
        world_size: How many processes train.
        step: The step that this start goes on from; 0 for a new run.
        pid: The process of rank 0.
        command: How the run was started.
    """

    path: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "single"
    world_size: int = 1
    step: int = 0
    pid: int = 0
    command: str = ""


# The keys of a row that are numbers of a step by themselves; they are shown as train/<key>.
PLACES = ("step", "epoch", "time")


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a row by the names that W&B and TensorBoard show.

    Those of a step are under train/; several learning rates are lr/0, lr/1 and so on.
    """
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if key in PLACES:
            continue
        name = key if "/" in key else f"train/{key}"
        if isinstance(value, (bool, str)):
            continue
        if isinstance(value, int | float):
            numbers[name] = value
        elif isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
            if len(value) == 1:
                numbers[name] = value[0]
            else:
                numbers.update({f"{name}/{number}": item for number, item in enumerate(value)})
    return numbers


def kind_of(row: Mapping[str, Any]) -> str:
    """What a row holds: `event`, `eval`, `histograms` or `train`."""
    if "event" in row:
        return "event"
    if "histograms" in row:
        return "histograms"
    if "loss" in row:  # most rows, and no need to look through them
        return "train"
    return "eval" if any(key.startswith("eval/") for key in row) else "train"
