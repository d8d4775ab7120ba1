"""How many steps are left of a run in which a random rank is killed again and again, and whether they are the same.

    python benchmarks/goodput.py [--seconds 600] [--every 60]

Two gloo ranks, first unbroken, then with a SIGKILL every so many seconds; the second run's numbers must be the first
one's to the last bit, as far as it came. Both are counted from the command on, start included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bigtrain.tracking.reading import read_rows  # noqa: E402

EXACT = ("step", "loss", "grad_norm", "lr", "samples", "epoch")


def run_file(name: str) -> dict[str, Any]:
    return {
        "run": {"name": name, "deterministic": True},
        "task": "causal_lm",
        "model": {
            "name": "gpt",
            "args": {"vocab": 257, "context": 64, "layers": 2, "heads": 4, "width": 128, "dropout": 0.1},
        },
        "data": {
            "name": "synthetic",
            "args": {"kind": "causal_lm", "samples": 4096, "context": 64, "vocab": 257},
            "batch_size": 32,
            "eval": "none",
        },
        "train": {"steps": 10_000_000},
        "engine": {"name": "ddp", "device": "cpu"},
        "checkpoint": {"every_steps": 20},
        "track": {"log_every": 1, "progress": "none", "wandb": "disabled"},
        "launch": {"max_restarts": 10},
    }


def last_step(folder: Path, name: str) -> int:
    path = folder / "runs" / name / "metrics.jsonl"
    lines = path.read_bytes().rsplit(b"\n", 3)[-3:] if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"}")]
    return max((row["step"] for row in rows if "loss" in row), default=0)


def train(folder: Path, name: str, seconds: float, every: float | None) -> int:
    """Train for so many seconds and return the steps taken."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run_file(name)))
    choose = random.Random(0)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bigtrain", "launch", f"{name}.yaml", "--nproc=2"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    next_kill, kills = began + (every or seconds + 1), 0
    while time.monotonic() - began < seconds:
        time.sleep(0.1)
        if time.monotonic() > next_kill:
            next_kill += every or 0
            below = psutil.Process(process.pid).children(recursive=True)
            ranks = [process for process in below if process.name().startswith("bigtrain-")]
            if ranks:
                kills += 1
                choose.choice(ranks).send_signal(signal.SIGKILL)
    steps = last_step(folder, name)
    process.send_signal(signal.SIGINT)
    process.wait()
    print(f"{name}: {steps} steps in {seconds:.0f} s, {kills} kills", flush=True)
    return steps


def numbers(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = read_rows(folder / "runs" / name)
    return [{key: row[key] for key in EXACT} for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = train(folder, "unbroken", given.seconds, None)
        broken = train(folder, "killed", given.seconds, given.every)
        both = list(zip(numbers(folder, "unbroken"), numbers(folder, "killed"), strict=False))
    is_exact = bool(both) and all(ours == theirs for ours, theirs in both)
    print(
        f"goodput: {broken / whole:.1%} of the unbroken run's steps; {len(both)} steps in both, bit-exact: {is_exact}"
    )


if __name__ == "__main__":
    main()
