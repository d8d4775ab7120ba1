"""What a signal does to a training that has not begun its steps: it ends, and says what there is of it.

From its steps on, `bigtrain.health.signals` lets the step end and saves. This module imports nothing heavy, as most of
the time before the first step goes into imports.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bigtrain.terminal import leave_terminal


class StoppedEarly(SystemExit):
    """A signal has come before the first step.

    Args:
        number: Which one; the process ends with 128 + it, as a shell reports of one that was ended by a signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)

    def __str__(self) -> str:
        return "stopped before its first step"


_before: dict[int, Any] = {}  # the handlers that were there
_heard: list[int] = []


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP raise `StoppedEarly`, until the steps begin or a first one has come."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            _before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        _put_back()
        _heard.clear()


def steps_begin() -> None:
    """Leave signals to the loop, whose main thread must call it.

    Raises:
        StoppedEarly: Where one has come, and something that was imported has kept its exception to itself.
    """
    _put_back()
    if _heard:
        raise StoppedEarly(_heard.pop())


def _stop(number: int, frame: FrameType | None) -> None:
    _put_back()
    _heard.append(number)
    if number == signal.SIGHUP:
        leave_terminal()
    raise StoppedEarly(number)


def _put_back() -> None:
    while _before:
        signal.signal(*_before.popitem())
