"""How often a launcher was asked to leave."""

import signal
import time

import pytest

from launchers.supervise import _Interrupt


@pytest.mark.parametrize(
    ("number", "is_once_more"), [(signal.SIGHUP, False), (signal.SIGTERM, False), (signal.SIGINT, True)]
)
def test_a_wish_that_is_told_twice_is_one_but_for_who_presses_a_key_again(number, is_once_more):
    """A terminal that is closed is told of by its shell, and by the system: ranks have all their time to save."""
    interrupt = _Interrupt()
    with interrupt:
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert interrupt.number == number
    assert interrupt.is_over(time.monotonic() + 60) == is_once_more
