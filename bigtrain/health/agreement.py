"""What ranks must agree on, in one small reduction a step that nobody waits for.

A rank that wants something of all (stop, say) posts it at step k; every rank acts on it at step k + 1, so that none
leaves while others wait in a collective.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from bigtrain.dist import World


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
