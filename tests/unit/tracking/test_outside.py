"""Trackers in their own process: rows reach them, and whatever they do, the one who logs never waits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.outside import Outside, Spec
from tests.helpers.wandb_server import wait_until

ROOT = Path(__file__).parents[3]
# A user's trackers, one of each temper.
TRACKERS = '''
import json, os, sys, time

class Kind:
    """Keeps rows in a file."""
    def __init__(self, run, path, after=""):
        self.file, self.run, self.after = open(path, "w"), run, after
    def log(self, row):
        print(json.dumps(row), file=self.file, flush=True)
    def close(self):
        print(json.dumps({"closed": self.run.name, "after": self.after}), file=self.file, flush=True)

class Failing(Kind):
    def log(self, row):
        raise RuntimeError("no room\\nat the inn")

class Leaving(Kind):
    def log(self, row):
        sys.exit(3)

class Dying(Kind):
    def log(self, row):
        os.kill(os.getpid(), 9)

class Saying(Kind):
    """Says itself how to send what it has, and fails then."""
    def __init__(self, run, say, path):
        super().__init__(run, path)
        self.say = say
    def log(self, row):
        self.say("to send it: so")
        raise RuntimeError("no room")

class Hanging(Kind):
    def log(self, row):
        time.sleep(1000)
    close = log

class Loud(Kind):
    def log(self, row):
        print("x" * 100_000)
        sys.stderr.write("y" * 100_000)
        super().log(row)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_trackers.py").write_text(TRACKERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def start(folder: Path, *tempers: str, said: list[str], seconds: float = 28.0) -> Outside:
    specs = [Spec(t, f"my_trackers:{t}", {"path": str(folder / f"{t}{i}")}) for i, t in enumerate(tempers)]
    return Outside(specs, TrackedRun(str(folder), "mine"), folder / "log", said.append, seconds)


def kept(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_arrive_in_order_and_floats_whole(folder: Path) -> None:
    said: list[str] = []
    outside = start(folder, "Kind", "Kind", said=said)
    rows = [{"step": step, "loss": 0.1 + step / 3, "note": "ä"} for step in range(500)] + [{"step": 500, "loss": 1e400}]
    for row in rows:
        outside.log(row)
    outside.close()
    for name in ("Kind0", "Kind1"):
        assert kept(folder / name) == [*rows, {"closed": "mine", "after": ""}]
    assert said == []
    assert (folder / "log").read_text() == ""


def test_what_they_print_goes_to_the_log(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    outside = start(folder, "Loud", said=said)
    for step in range(20):
        outside.log({"step": step})
    outside.close()
    assert len(kept(folder / "Loud0")) == 21
    assert capfd.readouterr() == ("", "")
    assert (folder / "log").stat().st_size == 20 * 200_001


@pytest.mark.slow
def test_rows_of_megabytes_do_not_hold_up_those_that_follow(folder: Path) -> None:
    said: list[str] = []
    outside = start(folder, "Kind", said=said)
    rows = [{"step": 0, "histograms": "x" * 5_000_000}, *({"step": step} for step in range(1, 12))]
    for row in rows:
        outside.log(row)
        time.sleep(0.05)  # a step
    wait_until(lambda: (folder / "Kind0").exists() and len(kept(folder / "Kind0")) > 0, 10)
    for step in range(12, 20):
        outside.log({"step": step})
        time.sleep(0.15)
    wait_until(lambda: len(kept(folder / "Kind0")) == 20, 10)
    outside.close()
    assert said == []


def test_a_process_with_thousands_of_files_closes_as_any(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200) if hard < 0 else min(max(soft, 1200), hard), hard))
    said: list[str] = []
    with ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        outside = start(folder, "Kind", said=said)
        outside.log({"step": 1})
        outside.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(kept(folder / "Kind0")) == 2
    assert said == []


@pytest.mark.parametrize(
    ("temper", "words"),
    [
        (
            "Failing",
            "warning: Failing stopped: RuntimeError: no room; training goes on; metrics.jsonl has every number",
        ),
        ("Leaving", "warning: Leaving stopped: SystemExit: 3; training goes on"),
    ],
)
def test_one_that_fails_is_said_once_and_the_others_go_on(folder: Path, temper: str, words: str) -> None:
    said: list[str] = []
    outside = start(folder, temper, "Kind", said=said)
    for step in range(100):
        outside.log({"step": step})
    outside.close()
    assert len(said) == 1
    assert said[0].startswith(words)
    assert kept(folder / f"{temper}0") == [{"closed": "mine", "after": ""}]  # what it has is not thrown away
    assert len(kept(folder / "Kind1")) == 101


def test_one_that_takes_the_process_with_it_is_said_once(folder: Path) -> None:
    said: list[str] = []
    outside = start(folder, "Dying", said=said)
    until = time.monotonic() + 20
    while not said and time.monotonic() < until:
        outside.log({"step": 1})
        time.sleep(0.01)
    for step in range(100):
        outside.log({"step": step})
    outside.close()
    assert len(said) == 1
    assert said[0].startswith("warning: the process of Dying ended by signal SIGKILL; training goes on")


@pytest.mark.parametrize("temper", ["Dying", "Failing"])
def test_that_metrics_has_every_number_is_said_where_it_is_so(folder: Path, temper: str) -> None:
    said: list[str] = []
    spec = Spec(temper, f"my_trackers:{temper}", {"path": str(folder / "kept")})
    outside = Outside([spec], TrackedRun(".", "mine"), folder / "log", said.append, has_all=lambda: False)
    outside.log({"step": 1})
    outside.close()
    assert len(said) == 1
    assert said[0].endswith("training goes on")


@pytest.mark.parametrize(("temper", "times"), [("Kind", 0), ("Dying", 1), ("Saying", 1)])
def test_how_to_send_what_is_left_is_said_once_where_one_did_not_come_to_its_end(
    folder: Path, temper: str, times: int
) -> None:
    said: list[str] = []
    spec = Spec(temper, f"my_trackers:{temper}", {"path": str(folder / "kept")})
    run, left = TrackedRun(".", "mine"), "to send it: so"
    outside = Outside([spec], run, folder / "log", said.append, what_is_left=lambda: left)
    outside.log({"step": 1})
    outside.close()
    assert said.count(left) == times
    assert len(said) == 2 * times


def test_rows_that_wait_to_be_written_are_not_lost_numbers(folder: Path) -> None:
    """Many rows are kept, and then written at once: that one was left out here is said when it is in the file."""
    said: list[str] = []
    metrics = MetricsFile(folder / "metrics.jsonl", said.append)
    spec = Spec("Kind", "my_trackers:Kind", {"path": str(folder / "kept")})
    run, has_all = TrackedRun(".", "mine"), lambda: metrics.has_every_line
    outside = Outside([spec], run, folder / "log", said.append, has_all=has_all)
    for step in range(20_001):
        for tracker in (metrics, outside):
            tracker.add({"step": step})
    metrics.flush()
    outside.flush()
    assert said == ["warning: Kind cannot keep up, and rows are left out; metrics.jsonl has every number"]
    outside.close()
    metrics.close()


def test_one_that_is_unknown_is_said(folder: Path) -> None:
    said: list[str] = []
    outside = Outside([Spec("x", "my_trackers:Nobody")], TrackedRun(".", "mine"), folder / "log", said.append)
    outside.log({"step": 1})
    outside.close()
    assert [line.partition(";")[0] for line in said] == [
        "warning: x stopped: UserError: the module my_trackers has no 'Nobody'"
    ]


def test_one_that_hangs_holds_nobody_up(folder: Path) -> None:
    """The process is stopped, so that even the pipe fills."""
    said: list[str] = []
    outside = start(folder, "Hanging", said=said, seconds=1.0)
    assert outside._process is not None
    process = psutil.Process(outside._process.pid)
    process.suspend()
    longest = 0.0
    for step in range(25_000):
        began = time.perf_counter()
        outside.log({"step": step, "loss": 0.5, "note": "x" * 300})
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.5  # other processes take the processor, too
    kept_all = "; metrics.jsonl has every number"
    assert said == ["warning: Hanging cannot keep up, and rows are left out" + kept_all]
    began = time.perf_counter()
    outside.close()
    assert time.perf_counter() - began < 3
    assert said[1:] == ["warning: Hanging did not end in time, and their process was ended" + kept_all]
    assert not process.is_running()


@pytest.mark.slow
def test_that_the_end_waits_is_said_once(folder: Path) -> None:
    said: list[str] = []
    outside = start(folder, "Hanging", said=said, seconds=4.5)
    outside.log({"step": 1})
    outside.close()
    assert [line.partition(",")[0] for line in said] == ["waiting for Hanging", "warning: Hanging did not end in time"]


KILLED = """
import sys, time
from pathlib import Path
from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.outside import Outside, Spec
outside = Outside([Spec("k", "my_trackers:Kind", {"path": sys.argv[1]})], TrackedRun(".", "mine"), Path("log"), print)
for step in range(100):
    outside.log({"step": step})
print(outside._process.pid, flush=True)
time.sleep(100)
"""


def test_when_the_training_is_killed_they_write_what_they_have_and_leave(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    command = [sys.executable, "-c", KILLED, str(folder / "kept")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        helper = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE, 5)
    assert len(kept(folder / "kept")) == 101


def test_an_interrupt_of_the_terminal_does_not_reach_them(folder: Path) -> None:
    said: list[str] = []
    outside = start(folder, "Kind", said=said)
    assert outside._process is not None
    assert os.getsid(outside._process.pid) != os.getsid(0)
    outside.close()
