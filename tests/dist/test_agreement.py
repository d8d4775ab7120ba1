"""What one rank wishes, all ranks do, at the same step boundary."""

from __future__ import annotations

import torch

from bigtrain.dist import World, join
from bigtrain.health.agreement import Agreed, Agreement
from tests.helpers.distributed import run_distributed

WISHES = {
    1: lambda rank, agreement: rank == 1 and agreement.wish_to_save(),
    2: lambda rank, agreement: rank == 1 and agreement.wish_to_stop(again=True),
    4: lambda rank, agreement: rank == 0 and agreement.wish_to_stop(),
}
NOTHING, AGAIN = Agreed(False, False), Agreed(True, False, True)
EXPECTED = [NOTHING, Agreed(False, True), AGAIN, AGAIN, Agreed(True, False)]


def agree(way: str) -> list[tuple[bool, ...]]:
    with join("cpu") as world:
        return agreed_on(world, way)


def agreed_on(world: World, way: str) -> list[tuple[bool, ...]]:
    agreement, agreed = Agreement(world), []
    for step in range(len(EXPECTED)):
        WISHES.get(step, lambda rank, agreement: None)(world.rank, agreement)
        sums = torch.tensor([1.0, 0.1], dtype=torch.float64)
        if way != "alone":
            world.aboard[:] = [agreement]
        wait = world.start_sum_of_step(sums) if way == "early" else lambda sums=sums: world.sum_of_step(sums)
        wait()
        assert sums.tolist() == [world.size, 0.1 * world.size]
        assert world.aboard == []
        agreed.append(tuple(agreement.decide()))
    agreement.close()
    return agreed


def test_with_the_sums_of_the_same_step() -> None:
    for way in ("with the sums", "early"):
        for agreed in run_distributed(agree, 2, way):
            assert agreed == EXPECTED


def test_in_a_message_of_their_own_a_step_later() -> None:
    for agreed in run_distributed(agree, 2, "alone"):
        assert agreed == [NOTHING, *EXPECTED[:-1]]


def test_one_process_hears_itself() -> None:
    world, agreement = World(), Agreement(World())
    world.aboard[:] = [agreement]
    sums = torch.ones(2)
    agreement.wish_to_save()
    assert world.sum_of_step(sums).tolist() == [1.0, 1.0]
    assert agreement.decide() == Agreed(False, True)
    assert agreement.decide() == NOTHING
