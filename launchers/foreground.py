"""A command that runs in place of the one that starts it: asked to leave when that one is, it has time for it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from bigtrain.terminal import leave_terminal


def run_in_foreground(command: Sequence[str]) -> tuple[int, int | None]:
    """Run a command to its end, however long it takes to save and leave.

    Returns:
        Its exit code, and the signal by which this process was asked to leave meanwhile, if it was.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    leaving = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        leaving.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in leaving}
    try:
        # A session of its own: a terminal's Ctrl-C reaches it through this process alone, once and not twice.
        process = subprocess.Popen(command, start_new_session=True)
        for number in asked:
            process.send_signal(number)
        return process.wait(), asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
