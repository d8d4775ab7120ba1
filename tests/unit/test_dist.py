"""A process's place among the others."""

import pytest
import torch
import torch.distributed as dist

from bigtrain.dist import World, choose_device, join, launched
from bigtrain.errors import SetupError


@pytest.fixture
def with_gpus(monkeypatch):
    """Make torch report so many GPUs, whatever this machine has."""

    def set_number(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return set_number


@pytest.mark.parametrize(
    ("gpus", "wanted", "local_rank", "expected"),
    [
        (0, "auto", 0, "cpu"),
        (0, "auto", 7, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda", 0, "cuda:0"),
        (2, "cpu", 0, "cpu"),
    ],
)
def test_devices(with_gpus, gpus, wanted, local_rank, expected):
    with_gpus(gpus)
    assert choose_device(wanted, local_rank) == torch.device(expected)


@pytest.mark.parametrize(("gpus", "wanted", "local_rank"), [(0, "cuda", 0), (2, "cuda", 2), (2, "auto", 2)])
def test_a_rank_without_a_gpu_is_refused(with_gpus, gpus, wanted, local_rank):
    with_gpus(gpus)
    with pytest.raises(SetupError) as caught:
        choose_device(wanted, local_rank)
    assert f"local rank {local_rank} needs a GPU of its own, and this machine has {gpus}" in caught.value.problem
    assert caught.value.where == "engine.device"
    assert "engine.device=cpu" in caught.value.remedy


def test_alone_there_is_no_group_unless_it_is_needed():
    assert not launched()
    with join("cpu") as world:
        assert world == World()
        assert world.is_main
        assert not dist.is_initialized()
        assert world.all_reduce(torch.tensor(3.0)) == 3
        assert world.all_gather_object("x") == ["x"]


def test_a_group_of_one_ends_with_its_block():
    with join("cpu", needs_group=True) as world:
        assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
        total = torch.tensor(3.0)
        dist.all_reduce(total, group=world.group)
        assert total == 3
    assert not dist.is_initialized()


def test_a_group_of_one_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), join("cpu", needs_group=True):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_a_group_that_was_there_before_stays():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with join("cpu", needs_group=True) as world:
            assert world.group is dist.group.WORLD
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
