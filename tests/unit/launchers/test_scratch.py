"""A launcher's scratch folder, which goes with it, in whatever way it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import scratch
from launchers.scratch import Scratch

MAKES_ONE = """
import sys, time
from pathlib import Path
from launchers import scratch
scratch.PLACE = Path(sys.argv[1])
held = scratch.Scratch()
print(held.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of /tmp, which is everybody's."""
    monkeypatch.setattr(scratch, "PLACE", tmp_path)
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600, time.time() - 3600))


def test_it_goes_at_the_end(place: Path) -> None:
    held = Scratch()
    Path(held.path, "inner").mkdir()
    held.close()
    held.close()
    assert not list(place.iterdir())


def test_what_a_killed_launcher_left_goes_at_the_next_start_and_a_live_ones_stays(place: Path) -> None:
    live = Scratch()
    dead = subprocess.Popen([sys.executable, "-c", MAKES_ONE, str(place)], stdout=subprocess.PIPE, text=True)
    assert dead.stdout is not None
    left = Path(dead.stdout.readline().strip())
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    (left / "inner").mkdir()
    for folder in (left, Path(live.path)):
        age(folder)
    Scratch().close()
    assert not left.exists()
    assert Path(live.path).exists()
    live.close()


def test_what_was_made_this_moment_and_what_is_no_folder_stay(place: Path) -> None:
    new, target = place / "bigtrain-agent-new", place / "precious"
    new.mkdir()
    target.mkdir()
    (place / "bigtrain-agent-link").symlink_to(target)
    (place / "bigtrain-agent-file").touch()
    age(place / "bigtrain-agent-file")
    Scratch().close()
    assert {path.name for path in place.iterdir()} == {
        "bigtrain-agent-new",
        "precious",
        "bigtrain-agent-link",
        "bigtrain-agent-file",
    }
