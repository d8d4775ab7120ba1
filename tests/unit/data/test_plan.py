"""Who reads what, against the rule told again in a few lines."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.order import shuffled
from bigtrain.data.plan import Planner, Position
from bigtrain.errors import DataError

SEED = 11


def planner(n, batch, micro, rank, world, static=False):
    return Planner(n, batch, micro, rank, world, static, shuffled(n, SEED))


def global_order(n: int, epoch: int) -> list[int]:
    return shuffled(n, SEED)(np.array([[epoch]]), np.arange(n)[None])[0].tolist()


def take(plans, count):
    return [plan for _, plan in zip(range(count), plans, strict=False)]


def microbatches_by_the_rule(step, micro, rank, world, static):
    """(indices that count, index that fills up, how many fill up) of each microbatch."""
    mine = np.array_split(step, world)[rank].tolist()
    filler = mine[-1] if mine else step[-1]
    expected = []
    for j in range(math.ceil(math.ceil(len(step) / world) / micro)):
        valid = mine[j * micro : (j + 1) * micro]
        size = micro if static else max(len(valid), 1)
        expected.append((valid, filler, size - len(valid)))
    return expected


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 40),
    world=st.integers(1, 7),
    micro=st.integers(1, 9),
    static=st.booleans(),
    start=st.tuples(st.integers(0, 2), st.integers(0, 59)),
)
def test_every_rank_does_what_the_rule_says(n, batch, world, micro, static, start):
    epoch, offset = start[0], min(start[1], n)
    micro = min(micro, math.ceil(batch / world))
    plans = [planner(n, batch, micro, rank, world, static).steps(Position(epoch, offset)) for rank in range(world)]
    if offset == n:
        epoch, offset = epoch + 1, 0
    for _ in range(6):
        step = global_order(n, epoch)[offset : offset + batch]
        for rank in range(world):
            plan = next(plans[rank])
            expected = microbatches_by_the_rule(step, micro, rank, world, static)
            assert [(m.indices, m.num_valid) for m in plan.microbatches] == [
                (valid + [filler] * fill, len(valid)) for valid, filler, fill in expected
            ]
            assert (plan.epoch, plan.step_in_epoch, plan.num_samples) == (
                epoch,
                math.ceil(offset / batch),
                len(step),
            )
            offset_after = offset + len(step)
            assert plan.end == ((epoch, offset_after) if offset_after < n else (epoch + 1, 0))
        epoch, offset = plan.end


def test_the_common_case_is_not_cut_short_where_another_rank_has_more():
    # 5 samples on 2 ranks in microbatches of 2: rank 0 has 3 and makes two; so must rank 1, which has 2.
    counts = [len(next(planner(5, 5, 2, rank, 2).steps(Position())).microbatches) for rank in (0, 1)]
    assert counts == [2, 2]


def test_the_order_survives_any_change_of_world_and_batch_size():
    n, read, position = 101, [], Position(3, 0)
    for world, batch, steps in [(4, 8, 3), (2, 8, 2), (3, 7, 4), (1, 5, 1)]:
        ranks = [take(planner(n, batch, 2, rank, world).steps(position), steps) for rank in range(world)]
        for plans in zip(*ranks, strict=True):
            read += [i for plan in plans for m in plan.microbatches for i in m.indices[: m.num_valid]]
            assert len({plan.end for plan in plans}) == 1
        position = ranks[0][-1].end
    assert position == (3, len(read))
    assert read == global_order(n, 3)[: len(read)]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 50), batch=st.integers(1, 60), world=st.integers(1, 5))
def test_every_sample_counts_once_an_epoch(n, batch, world):
    steps = math.ceil(n / batch)
    for epoch in (0, 1):
        ranks = [take(planner(n, batch, 4, r, world).steps(Position(epoch, 0)), steps) for r in range(world)]
        counted = [i for plans in ranks for plan in plans for m in plan.microbatches for i in m.indices[: m.num_valid]]
        assert sorted(counted) == list(range(n))


def test_a_trillion_samples_are_entered_anywhere():
    n = 10**12
    plan = next(planner(n, 8, 4, 1, 2).steps(Position(5, n - 11)))
    assert plan.end == (5, n - 3)
    assert all(0 <= i < n for m in plan.microbatches for i in m.indices)


def test_a_block_is_planned_as_its_steps_one_by_one():
    # Longer than a block of 16,384 indices, over the ends of three epochs.
    through = take(planner(7001, 64, 64, 0, 1).steps(Position()), 330)
    position = Position()
    for plan in through:
        assert next(planner(7001, 64, 64, 0, 1).steps(position)) == plan
        position = plan.end


@pytest.mark.parametrize("start", [(0, 11), (0, -1), (-1, 0)])
def test_a_place_outside_the_data_is_refused(start):
    with pytest.raises(DataError, match="cannot go on"):
        next(planner(10, 2, 2, 0, 1).steps(Position(*start)))
