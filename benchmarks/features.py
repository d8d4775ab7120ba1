"""What an epoch costs with cached features, beside running the frozen extractor in every epoch.

    python benchmarks/features.py [--size 64] [--epochs 6] [--rounds 2]

ResNet-18 with a new head on scikit-learn's digits, frozen but for the head: the same run with and without
`finetune.feature_cache`, in turns, in this process. Epochs are timed from end to end by the run's own clock, each with
its evaluation; the first one of a run is left out. In two of them the freeze plan is proved, which reads all weights.
The losses of both are compared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bigtrain  # noqa: E402
from bigtrain.tracking.reading import read_rows  # noqa: E402


def run_file(folder: Path, name: str, size: int, epochs: int, cache: Path | None) -> dict[str, Any]:
    frozen: dict[str, Any] = {"freeze": ["conv1.*", "bn1.*", "layer*"]}
    return {
        "run": {"name": name, "dir": str(folder)},
        "task": "classification",
        "model": {"name": "torchvision/resnet18", "args": {"in_channels": 1, "num_classes": 10}},
        "data": {"name": "digits", "args": {"size": size}, "batch_size": 64, "eval": {"split": 0.2}},
        "train": {"epochs": epochs},
        "optim": {"lr": 0.01},
        "engine": {"name": "single", "device": "cpu"},
        "finetune": {**frozen, **({"feature_cache": str(cache)} if cache else {})},
        "checkpoint": {"every_steps": None, "at_end": False},
        "track": {"log_every": 1, "progress": "none", "wandb": "disabled", "report": False},
    }


def timed(values: dict[str, Any]) -> tuple[float, list[float], list[float]]:
    """Seconds before the first step, seconds of each epoch but the first, and the losses."""
    ends: list[float] = []
    first: list[float] = []

    def look(info: bigtrain.StepInfo) -> None:
        first.append(time.perf_counter())
        if info.evaluation is not None:
            ends.append(time.perf_counter())

    began = time.perf_counter()
    run = bigtrain.train(values, hooks=[look])
    losses = [row["loss"] for row in read_rows(run.path) if "loss" in row]
    return first[0] - began, [b - a for a, b in itertools.pairwise(ends)], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    found: dict[str, list[float]] = {"extractor": [], "cached": []}
    starts: dict[str, list[float]] = {"extractor": [], "computed": [], "read": []}
    apart = 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in range(asked.rounds):
            cache = folder / f"features-{number}"
            losses = {}
            for kind, where in (("extractor", None), ("computed", cache), ("read", cache)):
                values = run_file(folder, f"{kind}-{number}", asked.size, asked.epochs, where)
                start, epochs, losses[kind] = timed(values)
                starts[kind].append(start)
                found["extractor" if where is None else "cached"] += epochs
            pairs = zip(losses["extractor"], losses["read"], strict=True)
            apart = max(apart, *(abs(a - b) / abs(a) for a, b in pairs))
    for kind, seconds in found.items():
        print(f"an epoch, {kind}: median {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")
    for kind, seconds in starts.items():
        print(f"up to the first step, {kind}: median {statistics.median(seconds):.2f} s")
    print(f"faster by a factor of {statistics.median(found['extractor']) / statistics.median(found['cached']):.0f}")
    print(f"losses differ by {apart:.1e} at most, relatively")


if __name__ == "__main__":
    main()
