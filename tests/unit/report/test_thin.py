"""Thinned curves keep their extremes, their ends and their gaps."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.report.thin import smoothed, thinned


@given(st.lists(st.floats(), min_size=1, max_size=300), st.integers(5, 40))
def test_extremes_ends_and_order_stay(values: list[float], most: int) -> None:
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept = thinned(x, y, most)
    assert len(kept.x) <= max(most, len(x) if len(x) <= most else most)
    assert (np.diff(kept.x) > 0).all()
    assert (kept.x[0], kept.x[-1]) == (x[0], x[-1])
    finite, left = y[np.isfinite(y)], kept.y[np.isfinite(kept.y)]
    if len(finite):
        assert (left.min(), left.max()) == (finite.min(), finite.max())
    places = kept.x.astype(int)
    assert ((kept.y == y[places]) | ~np.isfinite(y[places])).all()
    assert np.isfinite(y).all() == np.isfinite(kept.y).all()


def test_one_spike_among_a_hundred_thousand_is_kept() -> None:
    y = np.zeros(100_000)
    y[61_803] = 7.0
    kept = thinned(np.arange(100_000.0), y)
    assert len(kept.x) <= 800
    assert kept.y[kept.x == 61_803] == 7.0


def test_means_over_a_window_are_plain_means() -> None:
    y = np.array([1.0, 2.0, np.nan, 4.0, 5.0, np.inf, 7.0])
    expected = []
    for place in range(7):
        near = [value for value in y[max(place - 1, 0) : place + 2] if np.isfinite(value)]
        expected.append(sum(near) / len(near))
    assert smoothed(y, 3).tolist() == expected
    assert np.isnan(smoothed(np.full(5, np.nan), 3)).all()
