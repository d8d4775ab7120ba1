"""Signals: a handler only takes note, all ranks agree at a step boundary, save together and leave.

SIGUSR2 (a time limit is near, or a preemption) means save and be started again; SIGTERM, SIGINT and SIGHUP (a
closed terminal) mean save and leave.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bigtrain.early import Wishes, steps_begin
from bigtrain.health.agreement import Agreement
from bigtrain.runs import ATTEMPT_VARIABLE
from bigtrain.terminal import leave_terminal

# How long saving may take after a second wish.
_SHORT_WAIT_S = 10.0

# What came between two loops of a rank: whether each signal wished for another start.
_unheard: list[bool] = []


@contextmanager
def stop_on_signals(agreement: Agreement) -> Iterator[None]:
    """Let signals stop the run at a step boundary.

    A second SIGINT or SIGTERM ends a run that was started by hand at once; a rank that a launcher started gets some
    seconds, and ends at a third. Signals can be handled in the main thread only: elsewhere (a notebook's thread)
    nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    steps_begin()
    asked = _Asked(agreement)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, asked.leave) for number in asked.leaving}
    before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, asked.start_again)
    for again in _unheard:
        agreement.wish_to_stop(again=again)
    _unheard.clear()
    after = before
    try:
        yield
        if ATTEMPT_VARIABLE in os.environ:  # a rank runs several loops, one for each phase
            after = dict.fromkeys(before, lambda number, frame: _unheard.append(number == signal.SIGUSR2))
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)


def ignore_from_now_on() -> None:
    """Take no notice of further signals in a rank that leaves already.

    Python puts the default handlers back while it ends, and those would end it badly.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if ATTEMPT_VARIABLE in os.environ and is_main_thread:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


class _Asked:
    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self.leaving = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            self.leaving.append(signal.SIGHUP)
        self._before = {number: signal.getsignal(number) for number in self.leaving}
        self._is_rank = ATTEMPT_VARIABLE in os.environ
        self._wishes = Wishes()

    def start_again(self, number: int, frame: FrameType | None) -> None:
        self._agreement.wish_to_stop(again=True)

    def leave(self, number: int, frame: FrameType | None) -> None:
        self._agreement.wish_to_stop()
        if number == signal.SIGHUP:
            leave_terminal()
        is_new = self._wishes.hear(number, by_hand=not self._is_rank)
        if not self._is_rank:
            self._make_way(number, is_new)
        elif is_new and self._wishes.count == 2:
            timer = threading.Timer(_SHORT_WAIT_S, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()
        elif is_new and self._wishes.count > 2:
            os._exit(128 + number)

    def _make_way(self, number: int, is_new: bool) -> None:
        """Let a second wish do what it does to a process that nobody looks after."""
        if is_new and self._wishes.count > 1:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
