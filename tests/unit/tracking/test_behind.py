"""Rows written in a thread: nobody waits for the disk, and what must be there at once is."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import bigtrain
from bigtrain.progress import Hook, StepInfo
from bigtrain.tracking import behind as module
from bigtrain.tracking.behind import Behind
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.reading import read_rows
from tests.helpers.wandb_server import wait_until


class Slow(MetricsFile):
    """A file on a disk that takes nothing until it is let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = threading.Event()

    def flush(self) -> None:
        assert self.gate.wait(10)
        super().flush()


class Broken(MetricsFile):
    def flush(self) -> None:
        raise LookupError("a fault of its own")


def numbers(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step}


def steps_in(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread comes too late for everything."""
    monkeypatch.setattr(module, "_SECONDS_BETWEEN", 1000.0)


def test_the_last_row_is_written_though_none_follows(tmp_path: Path) -> None:
    behind = Behind([MetricsFile(tmp_path / "metrics.jsonl")])
    for step in (1, 2):
        behind.log(numbers(step))
        wait_until(lambda step=step: steps_in(tmp_path)[-1:] == [step], 5)
    behind.close()


def test_nobody_waits_for_the_disk_and_the_order_stays(tmp_path: Path) -> None:
    slow = Slow(tmp_path / "metrics.jsonl")
    behind = Behind([slow])
    began = time.monotonic()
    for step in range(1, 1001):
        behind.log(numbers(step))
        time.sleep(0.0005)  # the thread is in the middle of it
    assert time.monotonic() - began < 8
    assert steps_in(tmp_path) == []
    slow.gate.set()
    behind.log({"step": 1000, "event": "stop"})
    behind.close()
    assert steps_in(tmp_path) == [*range(1, 1001), 1000]


@pytest.mark.parametrize("row", [{"event": "checkpoint"}, {"eval/loss": 0.5}])
def test_what_happens_is_written_at_once_and_all_before_it(tmp_path: Path, later: None, row: Mapping[str, Any]) -> None:
    behind = Behind([MetricsFile(tmp_path / "metrics.jsonl")])
    behind.log(numbers(1))
    behind.log(numbers(2))
    assert steps_in(tmp_path) == []
    behind.log({"step": 2, **row})
    assert steps_in(tmp_path) == [1, 2, 2]
    behind.log(numbers(3))
    behind.close()
    assert steps_in(tmp_path) == [1, 2, 2, 3]


def test_a_fault_in_the_thread_is_the_training_s(tmp_path: Path) -> None:
    behind = Behind([Broken(tmp_path / "metrics.jsonl")])
    behind.log(numbers(1))
    behind._thread.join(5)
    with pytest.raises(LookupError, match="a fault of its own"):
        behind.log({"step": 2, "event": "stop"})
    with pytest.raises(LookupError, match="a fault of its own"):
        behind.close()


def test_rows_are_written_before_a_checkpoint_is_begun(tmp_path: Path, later: None) -> None:
    """A run that is killed right after a commit goes on from there: what it had logged before must be in the file."""
    found: dict[int, list[int]] = {}

    def look(info: StepInfo) -> None:
        found[info.step] = [row["step"] for row in read_rows(tmp_path / "it") if "loss" in row]

    values = {
        "run": {"dir": str(tmp_path), "name": "it"},
        "task": "classification",
        "data": {"name": "digits", "batch_size": 4, "eval": "none"},
        "train": {"steps": 12},
        "checkpoint": {"every_steps": 5},
        "track": {"log_every": 1, "wandb": "disabled", "progress": "none", "report": False},
    }
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    bigtrain.train(values, model=model, hooks=Hook(look, every=1))
    assert found[4] == []  # the thread is late: that they wait is what makes this a test
    assert found[6][:5] == [1, 2, 3, 4, 5]
    assert found[11][:10] == list(range(1, 11))


@pytest.fixture
def unanswering(tmp_path: Path) -> Iterator[Path]:
    """A file that takes no byte and answers no writer: a pipe that is full."""
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 65536)
    yield path
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):  # whoever still writes comes to its end
        while True:
            os.read(pipe, 1 << 20)
    os.close(pipe)


def test_a_disk_that_does_not_answer_is_not_waited_for_without_end(
    unanswering: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.3)
    behind = Behind([MetricsFile(unanswering)])
    began = time.monotonic()
    for step in range(1, 6):
        behind.log(numbers(step))
        behind.log({"step": step, "event": "something"})
    behind.close()
    assert 0.3 <= time.monotonic() - began < 5  # once for long, then for a moment each
    assert "does not answer" in caplog.text


def test_rows_that_wait_for_a_disk_are_not_without_bounds(unanswering: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever logs every step for hours would have no memory left."""
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(module, "_MOST_WAITING", 50)
    behind = Behind([MetricsFile(unanswering)])
    began = time.monotonic()
    for step in range(1, 50):
        behind.log(numbers(step))
    assert time.monotonic() - began < 0.2
    for step in range(50, 55):
        behind.log(numbers(step))
    assert time.monotonic() - began > 0.2
    behind.close()


def test_an_interrupt_while_lines_are_written_neither_doubles_nor_loses_one(tmp_path: Path) -> None:
    """Ctrl-C, a second time: it is raised in the main thread, wherever that is."""

    class Interrupted(MetricsFile):
        def flush(self) -> None:
            super().flush()
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt

    behind = Behind([Interrupted(tmp_path / "metrics.jsonl")])
    behind.log(numbers(1))
    behind.log({"step": 1, "event": "something"})
    behind.close()
    assert steps_in(tmp_path) == [1, 1]


def test_after_a_fault_no_row_is_taken_in_silence(tmp_path: Path) -> None:
    behind = Behind([Broken(tmp_path / "metrics.jsonl")])
    behind.log(numbers(1))
    behind._thread.join(5)
    with pytest.raises(LookupError):
        behind.log(numbers(2))
    with pytest.raises(LookupError):
        behind.close()


def test_one_that_fails_to_close_leaves_none_open(tmp_path: Path) -> None:
    class Last(MetricsFile):
        is_closed = False

        def close(self) -> None:
            super().close()
            self.is_closed = True

    last = Last(tmp_path / "metrics.jsonl")
    behind = Behind([Broken(tmp_path / "broken"), last])
    behind.log(numbers(1))
    with pytest.raises(LookupError):
        behind.close()
    assert last.is_closed


def test_a_child_that_the_users_code_forked_writes_nothing(tmp_path: Path, later: None) -> None:
    behind = Behind([MetricsFile(tmp_path / "metrics.jsonl")])
    behind.log(numbers(1))
    child = os.fork()
    if not child:
        behind.log({"step": 1, "event": "failure"})
        behind.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    behind.log({"step": 1, "event": "stop"})
    behind.close()
    assert steps_in(tmp_path) == [1, 1]
