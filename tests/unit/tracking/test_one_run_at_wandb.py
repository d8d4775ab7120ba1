"""A real training that is killed, requeued, and goes on under another engine is one run at W&B.

The requeue is what a scheduler sees of it: the signal before the time limit, and the exit code that asks for another
start. A real one, three times, is in tests/launchers/test_slurm.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.beats import AGAIN
from bigtrain.tracking import wandb_files
from bigtrain.tracking.reading import load_run
from tests.helpers.wandb_server import wait_until

ROOT = Path(__file__).parents[3]
MODEL = """
import time
from torch import nn

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)  # so that a signal finds it at work
        return super().forward(x.flatten(1))

def make():
    return Slow(64, 10)
"""
RUN: dict[str, Any] = {
    "task": "classification",
    "model": "slow_model:make",
    "data": {"name": "digits", "batch_size": 32, "eval": {"split": 0.2}},
    "train": {"steps": 120},
    "eval": {"every_steps": 15, "max_batches": 1},
    "checkpoint": {"every_steps": 20},
    "engine": {"device": "cpu"},
    "track": {"log_every": 1, "wandb": "offline"},
}


def start(folder: Path, engine: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigtrain", "train", "it.yaml", f"engine.name={engine}"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_one_run_over_a_kill_a_requeue_and_a_change_of_engine(tmp_path: Path) -> None:
    (tmp_path / "slow_model.py").write_text(MODEL)
    (tmp_path / "it.yaml").write_text(json.dumps(RUN))
    run = tmp_path / "runs" / "it"
    metrics = run / "metrics.jsonl"
    starts = (("single", 33, signal.SIGKILL, -9), ("single", 70, signal.SIGUSR2, AGAIN), ("fsdp", None, None, 0))
    for engine, until, number, code in starts:
        with start(tmp_path, engine) as process:
            if until is not None:
                wait_until(lambda until=until: last_step(metrics) >= until, 120)
                process.send_signal(number)
            out, _ = process.communicate(timeout=120)
            assert process.returncode == code, out
    record = load_run(run)
    assert [event["step"] for event in record.events if event["event"] == "start"][:2] == [0, 20]
    assert len([event for event in record.events if event["event"] == "start"]) == 3
    run_id = (run / "wandb_id").read_text().strip()
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    assert all(path.name.endswith(run_id) for path in folders)
    rows = [row for path in wandb_files.logs(run, run_id) for row in wandb_files.history(path)]
    for name, steps in (("train/loss", range(1, 121)), ("eval/accuracy", range(15, 121, 15))):
        sent = [(int(row["train/step"]), float(row[name])) for row in rows if name in row]
        assert [step for step, _ in sent] == list(steps)
        series = record.metrics[name]
        assert series.steps.tolist() == list(steps)
        # What was trained again is the same to the last bit, so what was sent before a kill holds.
        assert [value for _, value in sent] == pytest.approx(series.values.tolist(), rel=1e-12)
