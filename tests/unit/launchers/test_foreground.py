"""A command in the foreground is asked to leave with the one that started it, and has time for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers.foreground import run_in_foreground

# Longer than subprocess waits by itself, after Ctrl-C, before it kills.
CHILD = """
import pathlib, signal, sys, time

def leave(number, frame):
    time.sleep(0.6)
    pathlib.Path("saved").write_text(str(number))
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, leave)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_has_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(number)

    def ask() -> None:
        deadline = time.monotonic() + 30
        while not Path("ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    assert run_in_foreground([sys.executable, "-c", CHILD]) == (128 + number, number)
    assert Path("saved").read_text() == str(int(number))
    assert signal.getsignal(number) is before


def test_undisturbed_it_tells_how_it_ended() -> None:
    assert run_in_foreground([sys.executable, "-c", "raise SystemExit(3)"]) == (3, None)
