"""From the command to the first step, beside a torchrun script by hand; and from a killed rank to the next step.

    python benchmarks/starting.py [rounds]

The same model and data on two gloo ranks. Rounds of both are interleaved, and medians are printed. On a machine with
other work the numbers mean little.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]

BY_HAND = """
import time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(),
                                                    torch.nn.Linear(64, 10)))
data = TensorDataset(torch.randn(1024, 1, 28, 28), torch.randint(0, 10, (1024,)))
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for images, labels in loader:
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print("first step", time.time(), flush=True)
    break
dist.destroy_process_group()
"""

RUN_FILE = """
task: classification
model: bigmodel
data: {name: synthetic, args: {kind: classification, samples: 1024, shape: [1, 28, 28], classes: 10}, batch_size: 64}
train: {steps: 1000000}
engine: {name: ddp, device: cpu}
checkpoint: {every_steps: 200}
track: {log_every: 1, progress: none, wandb: disabled}
"""


def by_hand(folder: Path) -> float:
    """Seconds from the command to the first step."""
    (folder / "by_hand.py").write_text(BY_HAND)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "by_hand.py"]
    began = time.time()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    # How it ends does not count: gloo ends a process badly at times, when the other one is gone.
    return float(done.stdout.split("first step")[1].split()[0]) - began


def rows(path: Path, attempt: int = 0) -> list[dict[str, Any]]:
    """The steps of an attempt, as far as whole lines of them are there."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found: dict[int, list[dict[str, Any]]] = {}
    now = 0
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        now = row.get("attempt", now)
        found.setdefault(now, []).append(row)
    return [row for row in found.get(attempt, []) if "loss" in row]


def by_bigtrain(folder: Path) -> tuple[float, float]:
    """Seconds from the command to the first step, and from the death of a rank to the next step."""
    (folder / "run.yaml").write_text(RUN_FILE)
    metrics = folder / "runs/run/metrics.jsonl"
    command = [sys.executable, "-m", "bigtrain", "launch", "run.yaml", "--nproc=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.time()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(rows(metrics)) < 400:
        time.sleep(0.05)
    first = rows(metrics)[0]["time"] - began
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("bigtrain-")]
    killed = time.time()
    ranks[-1].send_signal(signal.SIGKILL)
    while not (after := rows(metrics, attempt=1)):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    return first, after[0]["time"] - killed


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    hand, ours, again = [], [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            hand.append(by_hand(Path(folder)))
            first, next_one = by_bigtrain(Path(folder))
            ours.append(first)
            again.append(next_one)
        print(f"round {number}: by hand {hand[-1]:.2f} s, bigtrain {ours[-1]:.2f} s, after a kill {again[-1]:.2f} s")
    middle = [statistics.median(taken) for taken in (hand, ours, again)]
    print(
        f"medians of {rounds}: by hand {middle[0]:.2f} s, bigtrain {middle[1]:.2f} s, {middle[1] / middle[0]:.2f} of it"
    )
    print(
        f"from a killed rank to the next step: {middle[2]:.2f} s, {middle[2] - middle[1]:+.2f} s beside a first start"
    )


if __name__ == "__main__":
    main()
