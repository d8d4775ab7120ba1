"""Who this process is among the others: ranks, devices, process groups.

What a rank must know of its start reaches it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as
torchrun sets them. Without them this is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.errors import SetupError


class Passenger(Protocol):
    """Numbers that travel with the sums of a step: a message of their own would cost as much as those do."""

    def numbers(self) -> Sequence[float]:
        """This rank's; as many on every rank."""

    def hear(self, sums: Sequence[float]) -> None:
        """Take their sums over all ranks."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_rank: This process's number on its machine.
        device: Where this rank computes.
        group: All ranks, for tensors on `device` and on the host; None in a world of one that needs none.
        aboard: Who travels with the sums of the next step, the same on all ranks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    aboard: list[Passenger] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place. Every rank must call it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], object]:
        """Sum a tensor over all ranks, in place, while something else is done: call what is returned to wait for it.

        Every rank must call it, in the same order among its other collectives.
        """
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return work.wait

    def sum_of_step(self, sums: Tensor) -> Tensor:
        """Sum a step's numbers, (n,), over all ranks, in place, and those of who is aboard. Every rank must call it."""
        if sums.device.type != "cpu":  # what a GPU knows nobody may wait for: nobody is aboard
            return self.all_reduce(sums)
        self.start_sum_of_step(sums)()
        return sums

    def start_sum_of_step(self, sums: Tensor) -> Callable[[], object]:
        """The same while something else is done: call what is returned to wait for it."""
        aboard, self.aboard[:] = list(self.aboard), []
        if self.size == 1 or not aboard or sums.device.type != "cpu":
            return self.start_all_reduce(sums)
        own = [passenger.numbers() for passenger in aboard]
        together = torch.cat((sums, *(sums.new_tensor(numbers) for numbers in own)))
        wait = self.start_all_reduce(together)

        def land() -> None:
            wait()
            sums.copy_(together[: len(sums)])
            heard = iter(together[len(sums) :].tolist())
            for passenger, numbers in zip(aboard, own, strict=True):
                passenger.hear([next(heard) for _ in numbers])

        return land

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def launched() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a rank: `auto` takes a GPU where there is one.

    Raises:
        SetupError: Where `cuda` is asked for and there is none for this rank.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise SetupError(
            f"local rank {local_rank} needs a GPU of its own, and this machine has {count}",
            where="engine.device",
            remedy="set launch.nproc to at most the number of GPUs, or engine.device=cpu",
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join(device: str = "auto", *, needs_group: bool = False, timeout_s: float = 1800.0) -> Iterator[World]:
    """Take this process's place in the world; leave it at the end.

    Args:
        device: auto, cpu or cuda.
        needs_group: Make a process group even in a world of one (FSDP2 and DDP need one).
        timeout_s: How long a collective may wait for a rank.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    place = choose_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1 and not needs_group:
        yield World(rank, size, local_rank, place)
        return
    if dist.is_initialized():  # a script or a test that made the group itself keeps it
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, place, dist.group.WORLD)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    alone: dict[str, Any] = {}
    if size == 1:  # there is nobody to meet
        store = dist.HashStore()  # type: ignore[attr-defined]
        alone = {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **alone)
    try:
        yield World(rank, size, local_rank, place, dist.group.WORLD)
    except BaseException:
        if size == 1:  # a failing rank of several must not wait for the others
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
