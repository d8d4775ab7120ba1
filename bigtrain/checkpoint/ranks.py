"""What the ranks of a run tell one another about checkpoints: small values, and whether anything failed.

Nothing here carries tensors. A step that can fail on one rank alone ends in `agree`, so that no rank goes on where
another cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from bigtrain.dist import World
from bigtrain.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The ranks that write and read a checkpoint together.

    Args:
        world: The processes; its group needs a backend for the host.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank = world.rank
        self.size = world.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which commits and chooses."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Every rank must call it."""
        return self._world.all_gather_object(value)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value. Every rank must call it."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._world.group, group_src=0)
        return values[0]

    def agree(self, action: Callable[[], T], otherwise: type[CheckpointError]) -> T:
        """Do something that may fail on this rank alone. Every rank must call it.

        Args:
            action: What to do; it must not communicate.
            otherwise: What to raise for an error that is none of ours.

        Raises:
            BigtrainError: On all ranks the error of the first rank that failed.
        """
        result, failure = self.attempt(action, otherwise)
        self.raise_first(failure)
        return result  # type: ignore[return-value]  # no failure: it is there

    def attempt(
        self, action: Callable[[], T], otherwise: type[CheckpointError]
    ) -> tuple[T | None, CheckpointError | None]:
        """Do something, and return what it came to or why it failed."""
        try:
            return action(), None
        except CheckpointError as error:
            return None, error
        except Exception as error:
            ours = otherwise(f"{type(error).__name__}: {error}", where=f"rank {self.rank}")
            ours.__cause__ = error
            return None, ours

    def raise_first(self, failure: CheckpointError | None) -> None:
        """Raise the first failure among the ranks, on all of them. Every rank must call it."""
        failures = self.gather(failure)
        if failure is not None and not any(failures[: self.rank]):
            raise failure  # with its traceback
        for other in failures:
            if other is not None:
                raise other
