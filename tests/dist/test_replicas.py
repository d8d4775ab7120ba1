"""Copies that differ, and starts that differ, in real ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from bigtrain.dist import World
from bigtrain.errors import DivergedError, SetupError
from bigtrain.health import sameness
from bigtrain.health.replicas import Replicas, digests, weighted_sum
from bigtrain.health.sameness import check_same
from bigtrain.state import BUFFER, WEIGHT, Box, EngineState, Piece, whole
from tests.helpers.distributed import run_distributed


def world() -> World:
    group = torch.distributed.group.WORLD
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), group=group)


def piece(name: str, data: torch.Tensor, kind: str = WEIGHT) -> Piece:
    return Piece(name, kind, tuple(data.shape), data.dtype, whole(data.shape), data, True)


def compare(flipped: tuple[int, str] | None, every: int | None) -> str | None:
    """Compare after each of 60 steps as the loop does; a bit of one rank's copy flips after step 25."""
    place = world()
    held = {"a.weight": torch.arange(12.0).reshape(3, 4), "scale": torch.tensor(2.0), "b": torch.zeros(5, dtype=torch.bool)}
    pieces = [piece(name, data, BUFFER if name == "b" else WEIGHT) for name, data in held.items()]
    # A part that only this rank holds, which no other rank is compared with.
    shard = torch.full((2,), float(place.rank))
    pieces.append(Piece("sharded", WEIGHT, (2 * place.size,), shard.dtype, Box((2 * place.rank,), (2,)), shard, True))
    replicas = Replicas(place, lambda: EngineState(pieces, {}), every)
    for step in range(1, 61):
        if step == 25 and flipped is not None and place.rank == flipped[0]:
            raw = held[flipped[1]].reshape(-1).view(torch.uint8)
            raw[raw.numel() // 2] ^= 1
        try:
            if replicas.is_due(step):
                replicas.compare(step)
        except DivergedError as error:
            return f"{step}: {error.problem} ({error.where})"
    return None


@pytest.mark.parametrize(("rank", "name"), [(2, "a.weight"), (1, "scale"), (0, "b")])
def test_a_flipped_bit_is_found_and_named(rank: int, name: str) -> None:
    told = run_distributed(compare, 3, (rank, name), 20)
    assert len(set(told)) == 1
    kind = "buffer" if name == "b" else "weight"
    assert told[0] == (
        f"40: after step 40 rank {rank} holds another {kind} {name} than the other ranks, which hold copies of it "
        f"(rank {rank}, {name})"
    )


def test_copies_that_are_the_same_and_comparing_nothing() -> None:
    assert run_distributed(compare, 2, None, 20) == [None, None]
    assert run_distributed(compare, 2, (1, "scale"), None) == [None, None]


def test_no_change_of_one_word_is_missed() -> None:
    """On a device the hash is a weighted sum; every bit of every word counts."""
    data = torch.randn(37)
    before = int(weighted_sum(data))
    raw = data.view(torch.uint8)
    for byte in range(raw.numel()):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert int(weighted_sum(data)) != before
            raw[byte] ^= 1 << bit
    assert int(weighted_sum(data)) == before
    odd = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    assert len({int(weighted_sum(odd + one)) for one in torch.eye(5, dtype=torch.uint8)}) == 5
    assert digests([data, data.clone()]) == digests([data.clone(), data])


def start(differs: str) -> str | None:
    place = world()
    mine = {"config": "a: 1", "fingerprint": "abc"}
    if place.rank == 1 and differs in mine:
        mine[differs] += "x"
    if place.rank == 1 and differs == "code":
        sameness.user_files = lambda: {"mine": Path(__file__)}  # type: ignore[assignment]
    try:
        check_same(place, **mine)
    except SetupError as error:
        assert pickle.loads(pickle.dumps(error)).problem == error.problem
        return error.problem
    return None


@pytest.mark.parametrize(
    ("differs", "what"), [("config", "the run file"), ("fingerprint", "the data"), ("code", "your code"), ("", None)]
)
def test_ranks_that_start_with_other_things_are_refused(differs: str, what: str | None) -> None:
    told = run_distributed(start, 2, differs)
    expected = None if what is None else f"rank 1 starts with other values than rank 0: {what} differs"
    assert told == [expected, expected]
