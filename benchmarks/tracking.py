"""What tracking adds to a step: to one that logs nothing, and to one that logs, with W&B offline and TensorBoard.

    python benchmarks/tracking.py [--rounds 6] [--steps 2000] [--every 10]

The same small model is trained with every tracker and with none, in turns (A B B A), in one process, one thread. The
time of a step is the time between two calls of the model's forward; the first hundred are not counted, nor those in
which the trackers' own process starts. What is added is the difference of the medians, of the steps that log nothing
and of those that log.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import warnings

import torch
from overhead import Samples, Timed

import bigtrain

SETTLING = 500
WITH = {"wandb": "offline", "tensorboard": True, "progress": "plain", "report": False}
WITHOUT = {"log_every": 10**9, "wandb": "disabled", "progress": "none", "report": False}


def measure(track: dict[str, object], steps: int, every: int) -> tuple[float, float]:
    """The median times of steps that log nothing, and of those that log, every so many, in microseconds."""
    torch.manual_seed(0)
    model = Timed()
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "run": {"dir": folder, "name": "it"},
            "data": {"batch_size": 32, "eval": "none"},
            "train": {"steps": steps},
            "optim": {"lr": 1e-3},
            "task": "classification",
            "checkpoint": {"every_steps": None, "at_end": False},
            "track": track,
        }
        bigtrain.train(run, model=model, data=Samples())
    times = model.times[1:] if len(model.times) > steps else model.times  # the first call tries the model out
    took = [(b - a) * 1e6 for a, b in itertools.pairwise(times)]
    # took[i] lies between the forward of step i + 1 and that of step i + 2: step i + 1 logs in it.
    quiet = [value for place, value in enumerate(took, 1) if place > SETTLING and place % every]
    logging_ = [value for place, value in enumerate(took, 1) if place > SETTLING and place % every == 0]
    return statistics.median(quiet), statistics.median(logging_)


def main() -> None:
    """Print what is added, for each round and as medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines of numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    added: list[tuple[float, float]] = []
    with_them = {**WITH, "log_every": arguments.every}
    for number in range(arguments.rounds):
        order = (with_them, WITHOUT) if number % 2 == 0 else (WITHOUT, with_them)
        found = {id(track): measure(track, arguments.steps, arguments.every) for track in order}
        (quiet, logs), (plain, plain_at_log) = found[id(with_them)], found[id(WITHOUT)]
        added.append((quiet - plain, logs - plain_at_log))
        print(f"round {number}: a step takes {plain:.0f} µs; added {added[-1][0]:+.1f} and {added[-1][1]:+.1f} µs")
    print(f"\ntorch {torch.__version__}, {arguments.rounds} rounds of {arguments.steps} steps, one thread\n")
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for name, values in zip(("a step that logs nothing", "a step that logs"), zip(*added, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):+.1f} µs | {min(values):+.1f} | {max(values):+.1f} |")


if __name__ == "__main__":
    main()
