"""Whole runs on a GPU, by the command: killed and started again, moved between engines, tried beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import zoo
from tests.helpers.launching import bigtrain, numbers, run_file


def on_gpu(folder: Path, name: str, engine: str = "ddp", **changes: Any) -> Path:
    """A small gpt with dropout, whose masks are drawn on the device, and deterministic algorithms."""
    return run_file(folder, name, **{"engine": {"name": engine, "device": "cuda"}, **changes})


def succeeds(folder: Path, *arguments: str) -> str:
    """What a command prints that ends well."""
    done = bigtrain(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path: Path, precision: str) -> None:
    engine = {"name": "ddp", "device": "cuda"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        path = run_file(folder, plant=True, engine=engine, precision=precision)
        if folder is killed:
            (folder / "planted/killed").write_text("0")
        out = succeeds(folder, "launch", str(path))
        assert ("starting again from " in out) == (folder is killed)
    assert len(numbers(whole / "runs/it")) >= 40
    assert numbers(killed / "runs/it") == numbers(whole / "runs/it")


def test_a_run_moves_between_engines(tmp_path: Path) -> None:
    """fsdp saves in the background, from pinned memory; single reads it on the GPU, and fsdp on the host."""
    # Neither dropout, whose masks differ between devices, nor a schedule that depends on the run's length.
    args = {"vocab": 257, "context": 32, "layers": 2, "heads": 2, "width": 32}
    plain = {"model": {"name": "gpt", "args": args}, "optim": {"schedule": {"name": "constant", "warmup_steps": 0}}}
    unbroken, moved = on_gpu(tmp_path, "unbroken", "single", **plain), on_gpu(tmp_path, "moved", "fsdp", **plain)
    succeeds(tmp_path, "train", str(unbroken))
    for engine, device, steps in (("fsdp", "cuda", 15), ("single", "cuda", 30), ("fsdp", "cpu", 40)):
        succeeds(tmp_path, "train", str(moved), f"engine={engine}", f"engine.device={device}", f"train.steps={steps}")
    succeeds(tmp_path, "ckpt", "verify", str(tmp_path / "runs/moved"))
    ours, theirs = (losses(tmp_path / "runs" / name) for name in ("moved", "unbroken"))
    assert ours.keys() == theirs.keys() == set(range(1, 41))
    assert all(zoo.relative(ours[step], theirs[step]) < 1e-4 for step in ours)


def losses(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in numbers(path) if "loss" in row}


def test_what_is_said_before_a_run(tmp_path: Path) -> None:
    path = on_gpu(tmp_path, "it", "fsdp", precision="bf16", compile="blocks")
    assert "it will work" in succeeds(tmp_path, "try", str(path))
    assert json.loads(succeeds(tmp_path, "explain", str(path), "--json"))
    assert "CUDA" in bigtrain(tmp_path, "doctor").stdout
