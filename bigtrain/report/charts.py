"""Curves as SVG that needs no script: axes, grid, several lines, marks of what happened, values under the pointer.

The drawing is stretched to the width there is, so every text stands beside it in HTML and keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bigtrain.report.thin import Curve, Floats, smoothed, thinned
from bigtrain.report.words import escape, number, short

_SIDE = 1000  # of the square that is stretched
_COLUMNS = 120  # places under the pointer that tell their values
_LOG_FROM = 50.0  # a curve whose largest value is so many times its smallest is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What it is.
        x: Steps.
        y: Values.
        color: The number of its colour.
        is_noisy: Draw it faint, and its mean over a window above it.
        has_dots: Draw its points, which are few.
    """

    name: str
    x: Floats
    y: Floats
    color: int = 1
    is_noisy: bool = False
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a line from top to bottom."""

    step: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart: a title, lines over steps, marks.

    Attributes:
        title: Above it.
        lines: What is drawn, the first one lowest.
        marks: What happened.
        show: Makes words of a value.
        may_be_log: Whether a logarithmic axis is taken where values are far apart.
        from_zero: Whether the axis begins at zero.
        note: Below the title.
        legend: Whether lines are named.
        until: The last step of the axis, if no line goes further; it begins at 0.
    """

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    show: Callable[[float], str] = number
    may_be_log: bool = False
    from_zero: bool = False
    note: str = ""
    legend: bool = field(default=True)
    until: float = 1.0

    def html(self) -> str:
        """The chart as a figure; empty where no line has a finite value."""
        lines = [line for line in self.lines if np.isfinite(line.y).any()]
        if not lines:
            return ""
        scale = _Scale.of(lines, self.until, may_be_log=self.may_be_log, from_zero=self.from_zero)
        drawn = "".join(_draw(line, scale) for line in lines)
        marks = "".join(_mark(mark, scale) for mark in self.marks if scale.holds(mark.step))
        pointed = _under_pointer(lines, self.show, scale)
        label = "; ".join(f"{line.name}: {self.show(_last(line.y))} at step {short(line.x[-1])}" for line in lines)
        grid = "".join(f'<path class="grid" d="M0 {y:.1f}H{_SIDE}"/>' for y, _ in scale.y_ticks(self.show))
        return (
            f'<figure class="chart"><figcaption><b>{escape(self.title)}</b>{self._legend(lines)}</figcaption>'
            f'<div class="plot"><svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self.title)}. {escape(label)}">{grid}{marks}{drawn}{pointed}</svg>'
            + "".join(
                f'<i class="y" style="top:{y / 10:.2f}%">{escape(text)}</i>' for y, text in scale.y_ticks(self.show)
            )
            + "".join(f'<i class="x" style="left:{x / 10:.2f}%">{escape(text)}</i>' for x, text in scale.x_ticks())
            + f"</div>{f'<p>{escape(self.note)}</p>' if self.note else ''}</figure>"
        )

    def _legend(self, lines: Sequence[Line]) -> str:
        if not self.legend:
            return ""
        if len(lines) == 1 and lines[0].name == self.title:
            return f'<span class="last">{escape(self.show(_last(lines[0].y)))}</span>'
        items = (
            f'<span class="key c{line.color}">{escape(line.name)} <b>{escape(self.show(_last(line.y)))}</b></span>'
            for line in lines
        )
        return f'<span class="legend">{"".join(items)}</span>'


def _last(y: Floats) -> float:
    """The last finite value."""
    return float(y[np.flatnonzero(np.isfinite(y))[-1]])


@dataclass(frozen=True)
class _Scale:
    """Where steps and values lie in the square."""

    left: float
    right: float
    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, lines: Sequence[Line], until: float, *, may_be_log: bool, from_zero: bool) -> _Scale:
        x = np.concatenate([line.x for line in lines])
        y = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
        low, high = float(y.min()), float(y.max())
        is_log = may_be_log and low > 0 and high / low > _LOG_FROM
        if is_log:
            low, high = math.log10(low), math.log10(high)
        elif from_zero:
            low = min(low, 0.0)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
        bottom = low if from_zero and not is_log and low == 0 else low - room
        return cls(min(float(x.min()), 0.0), max(float(x.max()), until), bottom, high + room, is_log)

    def holds(self, step: float) -> bool:
        return self.left <= step <= self.right

    def x_of(self, x: Floats) -> Floats:
        return (x - self.left) / (self.right - self.left) * _SIDE

    def y_of(self, y: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.log10(y) if self.is_log else y
        return _SIDE - (values - self.low) / (self.high - self.low) * _SIDE

    def x_ticks(self) -> list[tuple[float, str]]:
        steps = [step for step in _nice(self.left, self.right, 5) if step == int(step)]
        return [(float(self.x_of(np.array([step]))[0]), short(step)) for step in steps if self.holds(step)]

    def y_ticks(self, show: Callable[[float], str]) -> list[tuple[float, str]]:
        if self.is_log:
            values = [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1)]
            if len(values) < 2:
                values = [10.0**power for power in _nice(self.low, self.high, 4)]
            values = values[:: max(1, len(values) // 5)]
        else:
            values = _nice(self.low, self.high, 4)
        axis = short if show is number else show
        places = self.y_of(np.array(values))
        return [(float(y), axis(value)) for y, value in zip(places, values, strict=True) if -1 <= y <= _SIDE + 1]


def _nice(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two others, about so many."""
    raw = (high - low) / wanted
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    gap = next(size * part for part in (1, 2, 2.5, 5, 10) if size * part >= raw)
    first = math.ceil(low / gap)
    return [round(gap * (first + index), 12) for index in range(wanted * 2 + 2) if gap * (first + index) <= high]


def _draw(line: Line, scale: _Scale) -> str:
    window = len(line.y) // 40 if line.is_noisy else 0
    if window < 3:
        drawn = _path(thinned(line.x, line.y), scale, f"line c{line.color}")
    else:
        drawn = _path(thinned(line.x, line.y), scale, f"line faint c{line.color}")
        drawn += _path(thinned(line.x, smoothed(line.y, window), 300), scale, f"line c{line.color}")
    if (line.has_dots and len(line.x) <= 60) or len(line.x) == 1:  # of one point there is no line to see
        # A line of no length with round ends is a dot that stretching leaves round.
        places = zip(scale.x_of(line.x), scale.y_of(line.y), strict=True)
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places if math.isfinite(y))
        drawn += f'<path class="dots c{line.color}" d="{dots}"/>'
    return drawn


def _path(curve: Curve, scale: _Scale, css: str) -> str:
    parts, is_down = [], False
    for x, y in zip(scale.x_of(curve.x).tolist(), scale.y_of(curve.y).tolist(), strict=True):
        if not math.isfinite(y):
            is_down = False
            continue
        parts.append(f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}")
        is_down = True
    return f'<path class="{css}" d="{"".join(parts)}"/>'


def _mark(mark: Mark, scale: _Scale) -> str:
    x = float(scale.x_of(np.array([mark.step]))[0])
    return f'<path class="mark {mark.kind}" d="M{x:.1f} 0V{_SIDE}"><title>{escape(mark.text)}</title></path>'


def _under_pointer(lines: Sequence[Line], show: Callable[[float], str], scale: _Scale) -> str:
    """Columns over the chart that light up and tell the values beneath."""
    steps = np.unique(np.concatenate([line.x for line in lines]))
    if len(steps) > _COLUMNS:
        steps = steps[np.linspace(0, len(steps) - 1, _COLUMNS).astype(np.int64)]
    places = scale.x_of(steps)
    edges = np.concatenate(([0.0], (places[1:] + places[:-1]) / 2, [float(_SIDE)]))
    columns = []
    for index, step in enumerate(steps):
        texts = [f"step {step:,.0f}"]
        for line in lines:
            at = int(np.searchsorted(line.x, step, side="right")) - 1
            if at >= 0:
                texts.append(f"{line.name} {show(float(line.y[at]))}")
        left, width = edges[index], edges[index + 1] - edges[index]
        text = escape("\n".join(texts))
        columns.append(f'<rect x="{left:.1f}" width="{width:.1f}" height="{_SIDE}"><title>{text}</title></rect>')
    return f'<g class="columns">{"".join(columns)}</g>'
