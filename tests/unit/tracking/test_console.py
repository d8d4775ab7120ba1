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
import time
from pathlib import Path

import pytest

from bigtrain.tracking import wording
from bigtrain.tracking.console import Console
from bigtrain.tracking.live import Losses
from tests.helpers.wandb_server import wait_until

ROOT = Path(__file__).parents[3]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SAY = """
import sys, time
from bigtrain.tracking.console import Console

steps, every, style, log = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
console = Console(steps, style, __import__("pathlib").Path(log), title="mine")
console.say("begins")
for step in range(every, steps + 1, every):
    row = {"epoch": 0, "loss": 1 - step / steps * 0.75, "grad_norm": 1.5, "lr": [1e-3, 1e-3], "samples_per_s": 12345.6}
    console.log({"step": step, **row, "peak_memory_bytes": 1.5e9, "peak_memory_rank": 3})
print("from a hook")
console.log({"step": steps, "epoch": 0, "eval/loss": 0.5, "eval/accuracy": 0.75})
for _ in range(3):
    console.log({"step": steps, "event": "warning", "text": "rank 1 is slow"})
console.log({"step": steps, "event": "checkpoint", "bytes": 41e6, "seconds": 0.5})
console.leave_view()
console.say("below")
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
    ("width", "first", "second"),
    [
        (
            100,
            "loss 0.2500   █▇▆▆▅▄▃▃▂▁   accuracy 0.7500   lr 0.001   norm 1.5",
            "mine   epoch 1   12,346 samples/s   memory 1.5 GB (rank 3)   saved step 100, 0:00 ago",
        ),
        (
            60,
            "loss 0.2500   █▇▆▆▅▄▃▃▂▁   accuracy 0.7500   lr 0.001",
            "mine   epoch 1   12,346 samples/s   memory 1.5 GB (rank 3)",
        ),
        (40, "loss 0.2500   accuracy 0.7500   lr 0.001", "mine   epoch 1   12,346 samples/s"),
    ],
)
def test_the_view_shows_what_fits(tmp_path: Path, width: int, first: str, second: str) -> None:
    shown = lines(on_terminal(tmp_path, width, "100", "10", "auto"))
    bars = [line for line in shown if "━" in line]
    assert re.fullmatch("━+ 100/100  100%", bars[-1])
    assert len(bars[-1]) == width
    after = shown[len(shown) - shown[::-1].index(bars[-1]) :]
    assert [line.rstrip() for line in after] == [first, second, "below", "ends"]
    assert max(map(len, shown)) <= width


def test_lines_stand_above_the_view_and_nothing_is_left_out(tmp_path: Path) -> None:
    shown = lines(on_terminal(tmp_path, 120, "100", "10", "auto"))
    assert shown[0] == "begins"
    assert "from a hook" in shown
    assert "epoch 1, step 100: evaluation  loss 0.5000  accuracy 0.7500" in shown
    assert shown.count("step 100: warning: rank 1 is slow") == 1
    assert shown[-1] == "ends"
    logged = (tmp_path / "log").read_text().splitlines()
    assert logged[0] == "begins"
    assert [line for line in logged if line.startswith("step 100/100  loss 0.2500")]
    assert "step 100: checkpoint, 41 MB in 0.5 s" in logged
    assert logged[-1] == "ends"


def test_the_view_is_not_drawn_for_every_step(tmp_path: Path) -> None:
    written = on_terminal(tmp_path, 120, "20000", "1", "auto")
    assert written.count("loss ") < 60  # one in a quarter of a second, and some for the lines that pass it


def test_what_a_terminal_cannot_show_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    shown = "\n".join(lines(on_terminal(tmp_path, 100, "100", "10", "auto")))
    assert "loss 0.2500   accuracy 0.7500   lr" in shown


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
        "step 10/100  loss 0.9250  12,346 samples/s  epoch 1  lr 0.001  norm 1.5",
        "step 100/100  loss 0.2500  12,346 samples/s  epoch 1  lr 0.001  norm 1.5",
        "from a hook",
        "epoch 1, step 100: evaluation  loss 0.5000  accuracy 0.7500",
        "step 100: warning: rank 1 is slow",
        "step 100: checkpoint, 41 MB in 0.5 s",
        "below",
        "ends",
    ]


def test_ten_thousand_slow_steps_are_less_than_a_megabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of every length, on a clock that runs faster."""
    for seconds in (0.1, 2.0, 30.0, 100.0):
        clock = [0.0]
        monkeypatch.setattr("bigtrain.tracking.console.time.monotonic", lambda clock=clock: clock[0])
        path = tmp_path / f"log-{seconds}"
        console = Console(1_000_000, "none", path)
        said, longest = 0.0, 0.0
        for step in range(1, 10_001):
            clock[0] += seconds
            before = path.stat().st_size if path.exists() else 0
            row = {"epoch": 12, "loss": 2.5, "grad_norm": 1.5, "lr": [1e-3, 1e-4], "tokens_per_s": 1.5e6, "mfu": 0.4}
            console.log({"step": step, **row})
            if path.stat().st_size > before:
                longest, said = max(longest, clock[0] - said), clock[0]
        assert path.stat().st_size < 1_000_000
        assert longest <= max(60.0, seconds)


def test_slow_steps_give_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.tracking.console._SECONDS_UNTIL_A_DRAWING", 0.02)
    monkeypatch.setattr("bigtrain.tracking.console._SECONDS_UNTIL_A_SIGN", 0.1)
    console = Console(100, "none", tmp_path / "log", step=lambda: 7)
    time.sleep(0.05)
    assert not (tmp_path / "log").exists()  # not before there has been time for a first number
    wait_until(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text().splitlines()) == 3)
    console.close()
    assert set((tmp_path / "log").read_text().splitlines()) == {"step 7/100"}


def test_a_sparkline_is_of_the_whole_run() -> None:
    losses = Losses()
    for step in range(10_000):
        losses.add(1 - step / 10_000)
    line = losses.line(24)
    assert len(line) == 24
    assert (line[0], line[-1]) == ("█", "▁")
    assert list(line) == sorted(line, reverse=True)
    assert len(losses._means) < 256
    losses.add(float("nan"))
    assert Losses().line(24) == ""


@pytest.mark.parametrize(
    ("number", "shown"), [(0.5, "0.5000"), (0.0, "0.0000"), (3e-6, "3e-06"), (-1e30, "-1e+30"), (float("nan"), "nan")]
)
def test_a_loss_that_is_small_or_large_is_seen(number: float, shown: str) -> None:
    row = {"step": 1, "loss": number, "epoch": 0, "lr": [0.1], "grad_norm": 1.0, "samples_per_s": 5.0}
    assert f"loss {shown}  " in wording.numbers(row, 10)
    assert wording.evaluation({"step": 1, "epoch": 0, "eval/loss": number}).endswith(f"  loss {shown}")
