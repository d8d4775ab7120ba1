"""A run folder, read: its config, its numbers as arrays, its checkpoints, what happened. It writes nothing.

A run that was killed leaves rows of steps that the next start takes again. The next start's rows replace them: the
series that come out of here have no hole and no double. What is damaged or missing is left out, and `problems` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from bigtrain.config.loader import load
from bigtrain.config.schema import Config
from bigtrain.errors import RunFolderError
from bigtrain.metrics import from_json
from bigtrain.runs import instead_of, is_run, run_at
from bigtrain.tracking.base import flat, kind_of
from bigtrain.tracking.soundness import is_row, is_tree, sound_result

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_ORDER = {"train": 0, "eval": 1}


class Series(NamedTuple):
    """One metric over the run.

    Attributes:
        steps: int64, rising; the number of steps taken.
        values: float64.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Metrics(Mapping[str, Series]):
    """Every metric by its name, as W&B and TensorBoard show it: train/loss, train/lr, eval/accuracy and so on.

    `train/` may be left out.
    """

    series: Mapping[str, Series] = field(repr=False)

    def __getitem__(self, name: str) -> Series:
        return self.series[name] if name in self.series else self.series[f"train/{name}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.series)

    def __len__(self) -> int:
        return len(self.series)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.series)})"

    def last(self) -> dict[str, float]:
        """The last value of each."""
        return {name: float(series.values[-1]) for name, series in self.series.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was committed.

    Attributes:
        step: The number of steps taken.
        path: Its folder.
        num_bytes: What its files take.
    """

    step: int
    path: Path
    num_bytes: int


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        path: The folder.
        values: The resolved run file as plain values; empty where it cannot be read.
        rows: The rows of metrics.jsonl, merged over starts.
        events: What happened, in order: starts, checkpoints, phases, warnings.
        result: What the finished run came to; empty where it is not finished.
        problems: What is missing or damaged, a line each.
    """

    path: Path
    values: Mapping[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    events: list[dict[str, Any]] = field(repr=False)
    result: Mapping[str, Any] = field(repr=False)
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @cached_property
    def config(self) -> Config:
        """The resolved run file."""
        return load(self.path / "config.yaml").config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved run file's values by dotted key."""
        return dict(_flattened(self.values)) if self.values else {}

    @cached_property
    def metrics(self) -> Metrics:
        """Every metric as arrays."""
        return Metrics(_columns(self.rows))

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, the oldest first."""
        found = []
        for path in sorted(_below(self.path / "checkpoints")):
            name = _CHECKPOINT.fullmatch(path.name)
            if name and (path / "manifest.json").is_file():
                found.append(Checkpoint(int(name[1]), path, sum(file.stat().st_size for file in _below(path))))
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.result)

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return max((int(row["step"]) for row in self.rows[-1:]), default=0)


def load_run(path: str | Path) -> RunRecord:
    """Read a run's folder, whatever state it is in.

    Args:
        path: The folder, or a file in it.

    Raises:
        RunFolderError: Where it is not the folder of a run.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    if not is_run(folder):
        remedy = instead_of(folder, "give the folder of a run, as runs/NAME")
        raise RunFolderError(f"{folder} is not the folder of a run", remedy=remedy)
    problems: list[str] = []
    written = list(_read_lines(folder / "metrics.jsonl", problems))
    rows, events = merged(written), [row for row in written if "event" in row]
    values = _read(folder / "config.yaml", lambda text: yaml.load(text, Loader=_YAML), problems)
    result = _read(folder / "result.json", lambda text: from_json(json.loads(text)), problems, must_exist=False)
    result = sound_result(result, problems)
    return RunRecord(folder, values, rows, events, result, tuple(problems))


def read_rows(folder: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, merged over starts; what is damaged is left out, and said in `problems`."""
    return merged(_read_lines(folder / "metrics.jsonl", [] if problems is None else problems))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """What happened in a run, in order."""
    return [row for row in _read_lines(folder / "metrics.jsonl", []) if "event" in row]


def find_run(name: str | Path, folder: str | Path = "runs") -> RunRecord:
    """Read a run by its folder, or by its name in the folder of all runs.

    Raises:
        RunFolderError: Where there is none.
    """
    path = Path(name)
    return load_run(path if is_run(path) else run_at(name, folder))


def merged(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order in which they were written, without those that a later start has written anew.

    A start tells the step that it goes on from; what comes after it of earlier starts is gone, but for what happened.
    """
    kept: list[tuple[tuple[int, int], dict[str, Any]]] = []
    for row in rows:
        step = row["step"]
        if "event" in row:
            place = (step + 1, -1) if row["event"] == "start" else None
        else:
            place = (step, _ORDER.get(kind_of(row), 2))
        while place and kept and kept[-1][0] >= place:
            kept.pop()
        if place and "event" not in row:
            kept.append((place, dict(row)))
    return [row for _, row in kept]


# libyaml's loader where it was built in: resolved run files are long, and lists of runs read many.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _below(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path, parse: Any, problems: list[str], *, must_exist: bool = True) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and is_tree(value):
            return value
        problems.append(f"{path.name} is damaged")
    except FileNotFoundError:
        if must_exist:
            problems.append(f"there is no {path.name}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {str(error).partition(chr(10))[0]}")
    return {}


def _read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        problems.append(f"there is no {path.name}")
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return
    damaged = 0
    for line in lines[:-1]:  # what follows the last newline was cut off, or is being written now
        try:
            row = json.loads(line)
            row = from_json(row) if b"nan" in line or b"inf" in line else row
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            yield row
        else:
            damaged += 1
    if damaged:
        lines_are = "line of {} is" if damaged == 1 else "lines of {} are"
        problems.append(f"{damaged} {lines_are.format(path.name)} damaged and left out")


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Every metric's column, by the names that `flat` gives; in a loop that is run for each of millions of values."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    names: dict[str, str] = {}
    for row in rows:
        step = row["step"]
        for key, value in row.items():
            if key == "step":
                continue
            kind = type(value)
            if kind is float or kind is int:
                name = names.get(key) or names.setdefault(key, key if "/" in key else f"train/{key}")
                _append(columns, name, step, value)
            elif kind is list:
                for name, item in flat({key: value}).items():
                    _append(columns, name, step, item)
    return {
        name: Series(np.asarray(steps, np.int64), np.asarray(values, np.float64))
        for name, (steps, values) in columns.items()
    }


def _append(columns: dict[str, tuple[list[int], list[float]]], name: str, step: int, value: float) -> None:
    column = columns.get(name)
    if column is None:
        column = columns[name] = ([], [])
    steps, values = column
    if not steps or steps[-1] != step:
        steps.append(step)
        values.append(value)


def _flattened(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flattened(item, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flattened(item, (*path, str(number)))
    else:
        yield ".".join(path), value
