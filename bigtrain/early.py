"""What a signal does to a training that has not begun its steps, or that was asked to stop already: it ends at once.

From its steps on, `bigtrain.health.signals` lets the step end and saves. This module imports nothing heavy, as most of
the time before the first step goes into imports.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bigtrain.terminal import leave_terminal

# A shell and the system both tell of a terminal that is closed, and timeout(1) tells a program and its group.
_SAME_WISH_S = 2.0


class StoppedEarly(SystemExit):
    """A signal has come before the first step.

    Args:
        number: Which one; the process ends with 128 + it, as a shell reports of one that was ended by a signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)

    def __str__(self) -> str:
        return "stopped before its first step"


class EndedAtOnce(KeyboardInterrupt):
    """A signal other than Ctrl-C's has come where nothing waits for the end of a step: once more, or after the last.

    Args:
        number: Which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Wishes:
    """Counts what asks to stop: the same wish, told twice within a moment, is one."""

    def __init__(self) -> None:
        self._last: float | None = None
        self.count = 0

    def hear(self, number: int, *, by_hand: bool) -> bool:
        """Note a signal; False where it says no more than the last one did.

        Args:
            number: Which one.
            by_hand: Whether Ctrl-C is somebody's who presses it again.
        """
        now, last = time.monotonic(), self._last
        if last is not None and now - last < _SAME_WISH_S and not (by_hand and number == signal.SIGINT):
            return False
        self._last = now
        self.count += 1
        return True


_before: dict[int, Any] = {}  # the handlers that were there
_heard: list[int] = []


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP raise `StoppedEarly`, until the steps begin or a first one has come.

    From then on they raise KeyboardInterrupt, but where the loop's own handlers stand.
    """
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
    if _heard:
        raise StoppedEarly(_heard.pop())
    for number, handler in _before.items():
        if signal.getsignal(number) is _stop:
            signal.signal(number, _end_at_once if handler is signal.SIG_DFL else handler)


def _stop(number: int, frame: FrameType | None) -> None:
    _put_back()
    _heard.append(number)
    if number == signal.SIGHUP:
        leave_terminal()
    raise StoppedEarly(number)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        leave_terminal()
    raise EndedAtOnce(number)


def _put_back() -> None:
    while _before:
        signal.signal(*_before.popitem())
