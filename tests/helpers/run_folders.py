"""Run folders as runs write them, without training: two restarts, a spike, evaluations, checkpoints, a matrix."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from bigtrain.config.loader import dump, load
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.repro import write_repro

ROOT = Path(__file__).parents[2]
BEGAN = 1_700_000_000.0
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def make_run(
    folder: Path, *overrides: str, steps: int = 2000, every: int = 1, seed: int = 0, done: bool = True
) -> Path:
    """Write the folder of a run and return its path."""
    folder.mkdir(parents=True)
    config = load(ROOT / "configs/quickstart.yaml", [f"run.name={folder.name}", *overrides]).config
    (folder / "config.yaml").write_text(dump(config))
    _write_rows(folder, steps, every, random.Random(seed))
    if done:
        (folder / "result.json").write_text(json.dumps(_result(steps)))
        kept = [
            {"image": PIXEL, "target": "3", "prediction": "3", "confidence": 0.9},
            {"text": "To be", "target": " or"},
        ]
        (folder / "samples.json").write_text(json.dumps(kept))
    write_repro(folder, 0)
    return folder


def loss_at(step: int, steps: int) -> float:
    """The loss without its noise; there is a spike of 9 in the middle."""
    return 9.0 if step == steps // 2 else 2.3 * math.exp(-4 * step / steps) + 0.08


def _write_rows(folder: Path, steps: int, every: int, noise: random.Random) -> None:
    file = MetricsFile(folder / "metrics.jsonl")
    goes_back = {round(steps * 0.4): round(steps * 0.35), round(steps * 0.7): round(steps * 0.65)}
    step, attempt, now = 0, 0, BEGAN
    file.log(_start(0, attempt, now))
    while step < steps:
        step, now = step + 1, now + 0.03
        if step in goes_back:
            step, attempt, now = goes_back.pop(step), attempt + 1, now + 500
            file.log(_start(step, attempt, now))
            continue
        if step % every == 0:
            file.log(_row(step, steps, now, noise))
        if step % (steps // 20) == 0:
            scores = {"eval/loss": loss_at(step, steps) + 0.1, "eval/accuracy": 1 - 0.9 * math.exp(-5 * step / steps)}
            file.log({"step": step, "epoch": 0, "time": now, **scores})
            file.log({"step": step, "event": "checkpoint", "bytes": 4e7, "seconds": 0.3, "time": now})
    file.close()


def _start(step: int, attempt: int, now: float) -> dict[str, Any]:
    return {"step": step, "event": "start", "attempt": attempt, "engine": "fsdp", "world_size": 2, "time": now}


def _row(step: int, steps: int, now: float, noise: random.Random) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "samples": step * 64,
        "loss": loss_at(step, steps) + 0.05 * noise.random(),
        "grad_norm": noise.lognormvariate(0, 0.4),
        "lr": [1e-3, 1e-2],
        "samples_per_s": 2000 + 100 * noise.gauss(0, 1),
        "step_s": 0.03,
        "compute_s": 0.028,
        "data_wait_s": 0.002,
        "save_s": 0.0,
        "peak_memory_bytes": 1.2e9,
        "peak_memory_rank": 1,
        "time": round(now, 3),
    }


def _result(steps: int) -> dict[str, Any]:
    matrix = [[35 if row == column else row == 3 for column in range(10)] for row in range(10)]
    metrics = {"accuracy": 0.97, "confusion_matrix": [[int(cell) for cell in row] for row in matrix]}
    return {"steps": steps, "skipped_steps": 0, "engine": "fsdp", "world_size": 2, "metrics": metrics}
