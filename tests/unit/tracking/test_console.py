"""The console on a real pseudo-terminal and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SAY = """
import sys
from bigtrain.tracking.console import Console

steps, every, style, log = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
console = Console(steps, style, __import__("pathlib").Path(log))
console.say("begins")
for step in range(every, steps + 1, every):
    row = {"epoch": 0, "loss": 0.25, "grad_norm": 1.5, "lr": [1e-3, 1e-3], "samples_per_s": 12345.6}
    console.log({"step": step, **row})
print("from a hook")
console.log({"step": steps, "epoch": 0, "eval/loss": 0.5, "eval/accuracy": 0.75})
console.close()
console.say("ends")
"""


def on_terminal(folder: Path, width: int, *arguments: str, term: str = "xterm-256color") -> str:
    """What a program writes on a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", SAY, *arguments, str(folder / "log")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**variables, "TERM": term, "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


def lines(written: str) -> list[str]:
    """Everything that stood in one line at some time."""
    return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", written)) if line.strip()]


@pytest.mark.parametrize(
    ("width", "cells", "numbers"),
    [
        (140, 35, "step 100/100  loss 0.2500  12,346 samples/s  epoch 1  lr 1.00e-03  norm 1.500"),
        (80, 20, "step 100/100  loss 0.2500  12,346 samples/s  epoch 1"),
        (40, 10, "step 100/100  loss 0.2500"),
    ],
)
def test_the_bar_shows_what_fits(tmp_path: Path, width: int, cells: int, numbers: str) -> None:
    drawn = [
        line for line in lines(on_terminal(tmp_path, width, "100", "10", "auto")) if "step " in line and "━" in line
    ]
    bar, _, text = drawn[-1].partition(" ")
    assert text.strip() == numbers
    assert bar == "━" * cells
    assert max(map(len, drawn)) <= width


def test_lines_stand_above_the_bar_and_nothing_is_left_out(tmp_path: Path) -> None:
    shown = lines(on_terminal(tmp_path, 120, "100", "10", "auto"))
    assert shown[0] == "begins"
    assert "from a hook" in shown
    assert "epoch 1, step 100: evaluation  loss 0.5000  accuracy 0.7500" in shown
    assert shown[-1] == "ends"
    logged = (tmp_path / "log").read_text().splitlines()
    assert logged[0] == "begins"
    assert [line for line in logged if line.startswith("step 100/100  loss 0.2500")]
    assert logged[-1] == "ends"


def test_the_bar_is_not_drawn_for_every_step(tmp_path: Path) -> None:
    written = on_terminal(tmp_path, 120, "20000", "1", "auto")
    drawings = written.count("step ")
    assert drawings < 60  # one in a fifth of a second, and some for the lines that pass it


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path, term: str) -> None:
    written = on_terminal(tmp_path, 120, "100", "10", "auto", term=term)
    assert "━" not in written
    assert "step 100/100  loss 0.2500" in written


def test_a_pipe_gets_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAY, "100", "10", "auto", str(tmp_path / "log")]
    # What makes programs colour their output must not put a bar into a log.
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert ESCAPE.sub("", out).splitlines() == [
        "begins",
        "step 10/100  loss 0.2500  12,346 samples/s  epoch 1  lr 1.00e-03  norm 1.500",
        "step 100/100  loss 0.2500  12,346 samples/s  epoch 1  lr 1.00e-03  norm 1.500",
        "from a hook",
        "epoch 1, step 100: evaluation  loss 0.5000  accuracy 0.7500",
        "ends",
    ]
