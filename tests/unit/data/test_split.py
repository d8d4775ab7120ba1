"""The held-out share."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data import TrainLoader
from bigtrain.data.split import split
from bigtrain.errors import DataError


@settings(deadline=None)
@given(n=st.integers(2, 400), share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_both_parts_together_are_the_whole(n, share, seed):
    train, held_out = split(range(n), range(n), share, seed)
    assert sorted([*(train[i] for i in range(len(train))), *(held_out[i] for i in range(len(held_out)))]) == list(
        range(n)
    )
    assert len(held_out) == min(max(round(n * share), 1), n - 1)


def test_another_seed_holds_out_other_samples():
    held_out = [
        {part[i] for i in range(len(part))} for _, part in (split(range(1000), range(1000), 0.1, s) for s in (0, 0, 1))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_the_seed_of_the_run_does_not_move_it():
    train, _ = split(range(97), range(97), 0.3, 0)
    for seed in (0, 1):
        steps = islice(TrainLoader(train, batch_size=10, seed=seed).steps(), 7)
        seen = {index for step in steps for batch in step.microbatches for index in batch.indices}
        assert seen == {train[position] for position in range(len(train))}


def test_a_trillion_samples_need_no_memory():
    train, held_out = split(range(10**12), range(10**12), 0.25, 0)
    assert (len(train), len(held_out)) == (750_000_000_000, 250_000_000_000)
    assert 0 <= train[len(train) - 1] < 10**12


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_outside_is_refused(share):
    with pytest.raises(DataError, match="cannot be held out"):
        split(range(10), range(10), share, 0)


def test_one_sample_cannot_be_split():
    with pytest.raises(DataError, match="one sample"):
        split(range(1), range(1), 0.5, 0)


@pytest.mark.parametrize("index", [7, -1])
def test_a_part_ends_where_it_ends(index):
    train, _ = split(range(10), range(10), 0.3, 0)
    assert len(train) == 7
    with pytest.raises(IndexError):
        train[index]
