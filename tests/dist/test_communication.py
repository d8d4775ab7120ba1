"""How long a step only communicates, where it is known: one rank waits for the other."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import bigtrain
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.classification import Classification
from bigtrain.tracking.reading import read_rows
from tests.helpers.distributed import run_distributed

LATE_S = 0.2


class Late(Classification):
    """Another rank than the first is late in every step."""

    def __init__(self, rank: int, late_s: float) -> None:
        super().__init__()
        self._late_s = late_s if rank else 0.0

    def loss(self, model: Any, batch: Batch) -> LossSum:
        time.sleep(self._late_s)
        return super().loss(model, batch)


def train(folder: str, name: str, engine: str, late_s: float, **more: Any) -> None:
    run = {
        "run": {"dir": folder, "name": name, "threads": 1},
        "model": "simple_cnn",
        "data": {"name": "synthetic", "args": {"kind": "classification", "samples": 64}, "batch_size": 8, "eval": "none"},
        "train": {"steps": 12},
        "engine": {"name": engine, "device": "cpu"},
        "checkpoint": {"every_steps": None, "at_end": False},
        "track": {"log_every": 1, "communication_every": 6, "wandb": "disabled", "progress": "none", "report": False},
        **more,
    }
    bigtrain.train(run, task=Late(int(os.environ["RANK"]), late_s))


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_waiting_for_a_late_rank_is_communication(tmp_path: Path, engine: str) -> None:
    found = {}
    for name, late_s in (("late", LATE_S), ("even", 0.0)):
        run_distributed(train, 2, str(tmp_path), name, engine, late_s)
        rows = [row for row in read_rows(tmp_path / name) if "communication_s" in row]
        assert [row["step"] for row in rows] == [4, 10]  # the line after the step that was measured
        found[name] = min(row["communication_s"] for row in rows)  # on a busy machine both wait now and then
    assert 0.9 * LATE_S < found["late"] < 10 * LATE_S
    assert 0 < found["even"] < 0.5 * LATE_S


@pytest.mark.parametrize(("steps", "measured"), [([3, 8], [10]), ([2, 3], [10]), ([4, 9], [4])])
def test_a_profile_goes_before_it(tmp_path: Path, steps: list[int], measured: list[int]) -> None:
    """Steps 3 and 9 are due; torch refuses two profilers at a time."""
    run_distributed(train_profiled, 2, str(tmp_path), steps)
    assert [row["step"] for row in read_rows(tmp_path / "it") if "communication_s" in row] == measured
    assert (tmp_path / "it/profile/rank-00000.txt").exists()


def train_profiled(folder: str, steps: list[int]) -> None:
    train(folder, "it", "ddp", 0.0, profile={"steps": steps})
