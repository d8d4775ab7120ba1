"""What a launcher knows of the steps of ranks that it cannot ask any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bigtrain.beats import STEPS_VARIABLE, Steps, map_steps

RANK = """
import os, signal, sys
from bigtrain.beats import map_steps, write_step
memory = map_steps()
write_step(memory, int(sys.argv[1]), int(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_step_of_a_killed_rank_is_known() -> None:
    with closing(Steps(3)) as steps:
        assert steps.largest() is None
        for rank, step in ((2, 7), (0, 6)):
            environment = {**os.environ, STEPS_VARIABLE: steps.address}
            done = subprocess.run([sys.executable, "-c", RANK, str(rank), str(step)], env=environment, check=False)
            assert done.returncode == -signal.SIGKILL
        assert steps.largest() == 7


def test_what_is_not_the_launchers_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine the path may be anybody's."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    with mine.open("r+b") as file, closing(Steps(1)) as steps:
        name = steps.address.rpartition(":")[2]
        for address in (f"/proc/{os.getpid()}/fd/{file.fileno()}:{name}", f"/proc/0/fd/7:{name}", f"{mine}:", ""):
            monkeypatch.setenv(STEPS_VARIABLE, address)
            assert map_steps() is None
        monkeypatch.setenv(STEPS_VARIABLE, steps.address)
        assert map_steps() is not None
    assert mine.read_bytes() == b"precious"
