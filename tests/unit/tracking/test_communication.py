"""Time in which nothing but communication goes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.tracking.communication import Interval, alone

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda each: (each[0], sum(each))))


@pytest.mark.parametrize(
    ("spoken", "busy", "seconds"),
    [
        ([], [(0, 5)], 0),
        ([(0, 10)], [], 10),
        ([(0, 10)], [(2, 5), (4, 6)], 6),
        ([(0, 4), (3, 6)], [(6, 9)], 6),
        ([(0, 2)], [(-1, 3)], 0),
    ],
)
def test_what_is_alone(spoken: list[Interval], busy: list[Interval], seconds: float) -> None:
    assert alone(spoken, busy) == seconds


@given(INTERVALS, INTERVALS)
def test_it_is_what_counting_moments_says(spoken: list[Interval], busy: list[Interval]) -> None:
    def has(intervals: list[Interval], moment: int) -> bool:
        return any(start <= moment < end for start, end in intervals)

    assert alone(spoken, busy) == sum(has(spoken, moment) and not has(busy, moment) for moment in range(45))
