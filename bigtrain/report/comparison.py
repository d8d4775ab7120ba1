"""Several runs beside one another: where their run files differ, their metrics, their curves over each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bigtrain.config.keys import show
from bigtrain.metrics import is_better_when_small, is_score
from bigtrain.report.charts import Chart, Line
from bigtrain.report.facts import state_of, trained_for
from bigtrain.report.words import escape, num_bytes, number, seconds
from bigtrain.tracking.reading import RunRecord

# Differences that every two runs have.
_OF_EVERY_RUN = ("run.name",)
_SHOWN = ("train/loss", "train/grad_norm", "train/tokens_per_s", "train/samples_per_s", "train/mfu")
_COLORS = 6


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: The key or metric.
        cells: What each run has; empty where it has none.
        best: Which cell is best; None where that cannot be said.
    """

    name: str
    cells: tuple[str, ...]
    best: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Several runs, compared.

    Attributes:
        runs: The runs.
        names: What to call them: their folders' names, with what tells them apart where two are the same.
    """

    runs: tuple[RunRecord, ...]
    names: tuple[str, ...]

    def differences(self) -> list[Row]:
        """The keys of the run file in which not all agree."""
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        rows = []
        for key in keys:
            values = [run.settings.get(key, _ABSENT) for run in self.runs]
            if key not in _OF_EVERY_RUN and any(a != b or type(a) is not type(b) for a, b in pairwise(values)):
                rows.append(Row(key, tuple("" if value is _ABSENT else show(value) for value in values)))
        return rows

    def measures(self) -> list[Row]:
        """State, steps, the best and the last value of metrics, memory and time."""
        rows = [
            Row("state", tuple(state_of(run).word for run in self.runs)),
            Row("steps", tuple(f"{run.step:,}" for run in self.runs)),
        ]
        names = dict.fromkeys(name for run in self.runs for name in run.metrics)
        for name in names:
            if is_score(name):
                rows += [self._row(f"{name}, best", name, "best"), self._row(f"{name}, last", name, "last")]
        rows += [
            self._row(_short(name), name, "last" if "loss" in name else "median") for name in _SHOWN if name in names
        ]
        memory = [_largest(run, "train/peak_memory_bytes") for run in self.runs]
        if any(memory):
            rows.append(_ranked("peak memory", memory, lambda value: num_bytes(value), small=True))
        times = [trained_for(run) for run in self.runs]
        rows.append(_ranked("training time", times, seconds, small=True))
        return rows

    def _row(self, title: str, name: str, which: str) -> Row:
        small = is_better_when_small(name) or name == "train/grad_norm"
        values = [_value(run, name, which, small=small) for run in self.runs]
        judged = name != "train/grad_norm"
        return _ranked(title, values, number, small=small, judged=judged)

    def charts(self) -> list[Chart]:
        """One chart for each metric, a line for each run."""
        names = dict.fromkeys(name for run in self.runs for name in run.metrics)
        wanted = [name for name in names if is_score(name) or name in (*_SHOWN, "train/lr")]
        order = sorted(wanted, key=lambda name: (name != "train/loss", not name.startswith("eval/")))
        return [
            Chart(
                name,
                [self._line(place, run, name) for place, run in enumerate(self.runs) if name in run.metrics],
                may_be_log="loss" in name,
                from_zero=name.endswith("_per_s"),
            )
            for name in order
        ]

    def _line(self, place: int, run: RunRecord, name: str) -> Line:
        steps, values = run.metrics[name]
        is_eval = name.startswith("eval/")
        x = steps.astype(np.float64)
        return Line(self.names[place], x, values, 1 + place % _COLORS, is_noisy=not is_eval, has_dots=is_eval)

    def html(self) -> str:
        """The whole page."""
        from bigtrain.report import page

        different = self._table(self.differences()) or "<p>the run files say the same</p>"
        charts = "".join(chart.html() for chart in self.charts())
        title = " · ".join(self.names)
        return page(
            f"{title} · bigtrain",
            f"<header><h1>{escape(title)}</h1><p>{len(self.runs)} runs compared</p></header>"
            f'<section><h2>Where the run files differ</h2><div class="card">{different}</div></section>'
            f'<section><h2>Metrics</h2><div class="card">{self._table(self.measures())}</div></section>'
            f'<section><h2>Curves</h2><div class="charts">{charts}</div></section>',
        )

    def _table(self, rows: Sequence[Row]) -> str:
        if not rows:
            return ""
        head = "".join(f'<th class="n">{escape(name)}</th>' for name in self.names)
        body = "".join(
            f'<tr><td class="name">{escape(row.name)}</td>'
            + "".join(
                f'<td class="n{" best" if place == row.best else ""}">{escape(cell) or "–"}</td>'
                for place, cell in enumerate(row.cells)
            )
            + "</tr>"
            for row in rows
        )
        return f"<table><tr><th></th>{head}</tr>{body}</table>"


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Put runs beside one another."""
    names = [run.name for run in runs]
    unique = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
    return Comparison(tuple(runs), tuple(unique))


_ABSENT: Any = object()


def _short(name: str) -> str:
    return name.removeprefix("train/").replace("_", " ")


def _value(run: RunRecord, name: str, which: str, *, small: bool) -> float | None:
    if name not in run.metrics:
        return None
    values = run.metrics[name].values
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    if which == "last":
        return float(values[-1])
    if which == "median":
        return float(np.median(finite))
    return float(finite.min() if small else finite.max())


def _largest(run: RunRecord, name: str) -> float | None:
    return float(run.metrics[name].values.max()) if name in run.metrics else None


def _ranked(title: str, values: Sequence[float | None], words: Any, *, small: bool, judged: bool = True) -> Row:
    cells = tuple("" if value is None else words(value) for value in values)
    finite = {place: value for place, value in enumerate(values) if value is not None and math.isfinite(value)}
    best = None
    if judged and len(finite) > 1 and len(set(cells)) > 1:
        best = (min if small else max)(finite, key=lambda place: finite[place])
    return Row(title, cells, best)
