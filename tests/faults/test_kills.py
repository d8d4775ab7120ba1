"""Whole runs that are killed: each comes back from the last checkpoint, on the trajectory it would have had.

Kills are real (SIGKILL, of processes with real files). What is compared is everything: the merged series of losses,
norms and rates to the last bit, weights, moments and counters of the last checkpoint, and its random numbers.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.checkpoint import diff, find, open_checkpoint, verify
from bigtrain.errors import BigtrainError
from bigtrain.tracking.reading import read_rows
from tests.helpers.checkpoints import in_a_fork
from tests.helpers.distributed import run_distributed
from tests.helpers.faulty import FULL, before_file_operations
from tests.helpers.resuming import config

pytestmark = pytest.mark.slow

RANDOM_KILLS, KILLS_OF_RANKS, EVERY_OPERATION = (100, 50, 1) if FULL else (8, 3, 7)
SEED = int(os.environ.get("BIGTRAIN_SEED", time.time_ns() % 10**6))


def values(folder: Path) -> dict[str, Any]:
    return config(folder, checkpoint={"every_steps": 3, "keep": 2})


def train(folder: Path) -> None:
    bigtrain.train(values(folder))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert in_a_fork(lambda: train(folder)) == 0
    return folder / "runs" / "run"


def series(path: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_rows(path) if "loss" in row]


def assert_equal(path: Path, other: Path) -> None:
    assert series(path) == series(other)
    ours, theirs = (find(folder / "checkpoints")[0] for folder in (path, other))
    assert diff(ours, theirs).differences == ()
    with open_checkpoint(ours) as mine, open_checkpoint(theirs) as other_one:
        for rank in range(other_one.num_writers):
            assert mine.own(rank) == other_one.own(rank)
    assert all(verify(each).is_good for each in find(path / "checkpoints"))
    assert not [each for each in (path / "checkpoints").iterdir() if ".tmp" in each.name]


def killed_before(operation: int, folder: Path) -> Callable[[], None]:
    """Train, and die before the so-manyth file operation of the second checkpoint."""

    def body() -> None:
        counter = {"at": 0}
        lock = threading.Lock()

        def die(name: str, path: Path) -> None:
            if "step-00000006" not in str(path):
                return
            with lock:
                counter["at"] += 1
                if counter["at"] == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        with before_file_operations(die):
            train(folder)

    return body


def test_a_kill_before_an_operation_of_a_save(tmp_path, unbroken):
    operation, seen = 1, set()
    while True:
        folder = tmp_path / str(operation)
        folder.mkdir()
        status = in_a_fork(killed_before(operation, folder))
        if status == 0:
            break  # there are no more operations
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen.add(find(folder / "runs" / "run" / "checkpoints")[0].name)
        assert in_a_fork(lambda f=folder: train(f)) == 0
        assert_equal(folder / "runs" / "run", unbroken)
        operation += EVERY_OPERATION
    assert operation > 10
    # Of its own save it is the one before or the new one; later saves look at it, too, and the last one removes it.
    assert {"step-00000003"} <= seen <= {f"step-{step:08d}" for step in (3, 6, 9, 12)}


def test_kills_at_random_times(tmp_path, unbroken):
    chosen = random.Random(SEED)
    print(f"BIGTRAIN_SEED={SEED}")
    began = time.monotonic()
    whole = tmp_path / "whole"
    whole.mkdir()
    assert in_a_fork(lambda: train(whole)) == 0
    lasts = time.monotonic() - began
    for number in range(RANDOM_KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(chosen.randint(1, 3)):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)
                    train(folder)
                except BigtrainError:
                    pass  # it had finished before
                os._exit(0)
            time.sleep(chosen.uniform(0, lasts))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not (folder / "runs" / "run" / "result.json").exists():
            assert in_a_fork(lambda f=folder: train(f)) == 0
        assert_equal(folder / "runs" / "run", unbroken)


def train_as_ranks(folder: str, layout: str, victims: dict[int, float]) -> None:
    """Train as one of several ranks; a victim dies after so many seconds."""
    after = victims.get(int(os.environ["RANK"]))
    if after is not None:
        timer = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    engine = {"name": layout, "device": "cpu"}
    made = config(Path(folder), checkpoint={"every_steps": 3, "keep": 2}, engine=engine)
    bigtrain.train(made)


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_rank_is_killed_at_a_random_time(tmp_path, layout):
    chosen = random.Random(SEED)
    print(f"BIGTRAIN_SEED={SEED}")
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.monotonic()
    run_distributed(train_as_ranks, 2, str(whole), layout, {})
    lasts = time.monotonic() - began
    for number in range(KILLS_OF_RANKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        at = chosen.uniform(0.2, 1) * lasts
        victims = dict.fromkeys(chosen.choice([(0,), (1,), (0, 1)]), at)
        try:
            run_distributed(train_as_ranks, 2, str(folder), layout, victims)
        except BigtrainError:
            if not (folder / "runs" / "run" / "result.json").exists():  # else it was killed when all was done
                run_distributed(train_as_ranks, 2, str(folder), layout, {})
        assert_equal(folder / "runs" / "run", whole / "runs" / "run")
