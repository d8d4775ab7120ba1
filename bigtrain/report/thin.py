"""Making long curves short without losing what they show."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """Points of a curve, from left to right."""

    x: Floats
    y: Floats


def thinned(x: Floats, y: Floats, most: int = 800) -> Curve:
    """At most so many points, among them the smallest and the largest of every stretch, and both ends.

    Where values are not finite there is one NaN, so that a line breaks there.
    """
    if len(x) <= most:
        return Curve(x, y)
    stretches = max((most - 2) // 3, 1)
    edges = np.linspace(0, len(x), stretches + 1).astype(np.int64)
    starts = edges[:-1]
    finite = np.isfinite(y)
    lowest = _first_where(np.where(finite, y, np.inf), starts, edges, np.minimum)
    highest = _first_where(np.where(finite, y, -np.inf), starts, edges, np.maximum)
    broken = _first_where((~finite).astype(np.float64), starts, edges, np.maximum)
    broken = broken[~finite[broken]]
    kept = np.unique(np.concatenate(([0], lowest, highest, broken, [len(x) - 1])))
    return Curve(x[kept], np.where(finite[kept], y[kept], np.nan))


def _first_where(y: Floats, starts: NDArray[np.int64], edges: NDArray[np.int64], reduce: np.ufunc) -> NDArray[np.int64]:
    """In each stretch the first place of its smallest or largest value."""
    best = reduce.reduceat(y, starts)
    is_best = y == np.repeat(best, np.diff(edges))
    places = np.flatnonzero(is_best)
    return places[np.searchsorted(places, starts)]


def smoothed(y: Floats, window: int) -> Floats:
    """The mean over a window around each point; values that are not finite do not count."""
    if window < 2:
        return y
    finite = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(y))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(y))
    count = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, (sums[high] - sums[low]) / count, np.nan)
