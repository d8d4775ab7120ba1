"""What ranks must agree on, in one small reduction a step that nobody waits for.

A rank that wants something of all (stop, say) posts it at step k; every rank acts on it at step k + 1, so that none
leaves while others wait in a collective.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from bigtrain.dist import World
from bigtrain.errors import CombinationError
from bigtrain.state import BUFFER, Piece


class Agreement:
    """Whether any rank asked all to stop.

    Args:
        world: The ranks; in a world of one nothing is sent.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._wish = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def wish_to_stop(self) -> None:
        """Ask all ranks to stop. Safe in a signal handler."""
        self._wish = True

    def decide(self) -> bool:
        """Post this rank's wish and return what all ranks agreed on a step ago. Every rank calls it once a step."""
        if self._world.size == 1:
            return self._wish
        agreed = self._take()
        self._flag.fill_(self._wish)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._world.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait for the reduction that is under way."""
        self._take()

    def _take(self) -> bool:
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag.item())


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


@contextmanager
def stop_on_signals(agreement: Agreement) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the run at a step boundary; a second one ends it at once.

    Signals can be handled in the main thread only: elsewhere (a notebook's thread) nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        agreement.wish_to_stop()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
