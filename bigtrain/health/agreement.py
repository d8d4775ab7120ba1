"""What ranks must agree on, with the sums of a step on a CPU, in one small reduction that nobody waits for on a GPU.

A rank that wants something of all (stop, say) says so in step k; every rank acts on it at the end of the same step, at
the latest of step k + 1, so that none leaves while others wait in a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from bigtrain.dist import World
from bigtrain.errors import CombinationError
from bigtrain.state import BUFFER, Piece


class Agreed(NamedTuple):
    """What all ranks do at this step boundary.

    Attributes:
        stop: End the run here, with its state saved.
        save: Save a checkpoint.
        again: The run that ends here is to be started again.
    """

    stop: bool
    save: bool
    again: bool = False


# What a rank wishes, in the order in which wishes win: who is to leave for good is not started again.
_GO_ON, _AGAIN, _LEAVE = range(3)

_NOTHING = Agreed(False, False)


class Agreement:
    """What any rank asked of all.

    Args:
        world: The ranks; in a world of one nothing is sent.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = _GO_ON
        self._save = False
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._heard: Agreed | None = None

    def wish_to_stop(self, *, again: bool = False) -> None:
        """Ask all ranks to stop, for good or to be started again. Safe in a signal handler."""
        self._stop = max(self._stop, _AGAIN if again else _LEAVE)

    def wish_to_save(self) -> None:
        """Ask all ranks to save a checkpoint. Safe in a signal handler."""
        self._save = True

    def numbers(self) -> tuple[float, ...]:
        """This rank's wishes, to travel with the sums of a step: as counts, which can be summed."""
        save, self._save = self._save, False
        return float(self._stop == _AGAIN), float(self._stop == _LEAVE), float(save)

    def hear(self, sums: Sequence[float]) -> None:
        """Take what came of them: how many ranks wish it."""
        again, leave, save = sums
        self._heard = Agreed(bool(again or leave), bool(save), bool(again) and not leave)

    def decide(self) -> Agreed:
        """What all ranks agreed on. Every rank calls it once a step.

        Where no sums of a step have told it, wishes are posted now, and what was posted a step ago is returned.
        """
        if self._heard is not None:
            agreed, self._heard = self._heard, None
            return agreed
        wishes = (self._stop, self._save)
        self._save = False
        if self._world.size == 1:
            return _read(*wishes)
        agreed = self._take()
        self._flags[0], self._flags[1] = wishes
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._world.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait for the reduction that is under way."""
        self._take()

    def _take(self) -> Agreed:
        if self._work is None:
            return _NOTHING
        self._work.wait()
        self._work = None
        return _read(*self._flags.tolist())


def _read(stop: int, save: int) -> Agreed:
    return Agreed(stop != _GO_ON, bool(save), stop == _AGAIN)


def check_buffers(world: World, pieces: Iterable[Piece]) -> None:
    """Compare the buffers of all ranks, which each computed on its own. Every rank must call it.

    Args:
        world: The ranks.
        pieces: What this rank holds of the state.

    Raises:
        CombinationError: Where a buffer differs, as a mean over a rank's own samples does: what the run would keep of
            it would depend on the number of processes.
    """
    buffers = [piece for piece in pieces if piece.kind == BUFFER]
    of_ranks = world.all_gather_object({piece.name: _hash(piece.data) for piece in buffers})
    for rank, hashes in enumerate(of_ranks):
        different = [name for name, value in hashes.items() if value != of_ranks[0][name]]
        if different:
            raise CombinationError(
                f"after the first step the buffer {different[0]} of rank {rank} is not that of rank 0: "
                "the model makes it of a rank's own part of the batch",
                where="model",
                remedy="make it of all ranks' samples (torch.distributed.all_reduce in forward), leave it out, "
                "or train in one process",
            )


def _hash(tensor: Tensor) -> int:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(raw.numpy().data)
