"""`bigtrain try`, with its own processes, data, engine and files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]

MODELS = '''
import torch
from torch import nn

class Forgetful(nn.Module):
    """Keeps what it learns from in a plain attribute, which no checkpoint knows."""

    def __init__(self):
        super().__init__()
        self.flat, self.layer = nn.Flatten(), nn.Linear(64, 10)
        self.seen = 0

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.layer(self.flat(x)) * (1 + 0.1 * self.seen)
'''


def run_file(folder: Path, **changes: Any) -> Path:
    (folder / "models.py").write_text(MODELS)
    run = {
        "task": "classification",
        "model": {"name": "bigmodel"},
        "data": {"name": "digits", "args": {"size": 28}, "batch_size": 32},
        "train": {"epochs": 3},
        "engine": {"name": "fsdp", "device": "cpu"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **changes}))
    return path


def try_out(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path.parent}", "TMPDIR": str(path.parent)}
    command = [sys.executable, "-m", "bigtrain", "try", str(path), *arguments]
    done = subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    left = {entry.name for entry in path.parent.iterdir()} - {"models.py", "run.yaml", "__pycache__"}
    assert not {name for name in left if name.startswith(("runs", "bigtrain-try"))}  # nothing is made, nothing stays
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [{"name": "fsdp"}, {"name": "deepspeed", "deepspeed": {"stage": 2}}, {"name": "deepspeed"}],
    ids=["fsdp", "zero2", "zero3"],
)
def test_a_run_that_will_work(tmp_path: Path, engine: dict[str, Any]) -> None:
    done = try_out(run_file(tmp_path, engine={**engine, "device": "cpu"}, precision="bf16"), "--nproc=2")
    assert done.returncode == 0, done.stdout + done.stderr
    for told in (
        "2 steps: losses",
        "evaluation of 2 batches",
        "saved:",
        "built anew and loaded",
        "it will work: 153 steps",
    ):
        assert told in done.stdout


@pytest.mark.slow
def test_state_that_no_checkpoint_knows_is_found(tmp_path: Path) -> None:
    flat = {"name": "digits", "args": {"size": 8}, "batch_size": 32}
    path = run_file(tmp_path, model="models:Forgetful", data=flat, engine={"name": "single", "device": "cpu"})
    done = try_out(path, "--nproc=1")
    assert done.returncode == 1
    assert "the third step's loss is" in done.stderr
    assert "register what it keeps" in done.stderr
    assert "it will work" not in done.stdout


@pytest.mark.slow
def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    done = try_out(run_file(tmp_path, model="bigmodl"), "--nproc=2")
    assert done.returncode == 2
    assert "bigmodel" in done.stderr
    assert "Traceback" not in done.stderr
