"""What tracking adds to a step: to one that logs nothing, and to one that logs, with W&B offline and TensorBoard.

    python benchmarks/tracking.py [--rounds 6] [--steps 10000] [--every 10]

The same small model is trained with every tracker and with none, in turns (A B B A), in one process, one thread. The
time of a step is the time between two calls of the model's forward; those in which the trackers' own process starts
(some seconds of a second core) are not counted. What is added is the difference of the medians, of the steps that log
nothing and of those that log; and what a line costs altogether is the sum over the step that logs and those up to the
next, as the first of them find their data and code in no cache.
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

SETTLING = 10_000  # steps, three seconds: importing W&B and starting its service takes one or two
WITH = {"wandb": "offline", "tensorboard": True, "progress": "plain", "report": False}
WITHOUT = {"log_every": 10**9, "wandb": "disabled", "progress": "none", "report": False}


def measure(track: dict[str, object], steps: int, every: int) -> list[list[float]]:
    """The times of steps in microseconds: of those that log, of the first after each of them, and so on."""
    torch.manual_seed(0)
    model = Timed()
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "run": {"dir": folder, "name": "it"},
            "data": {"batch_size": 32, "eval": "none"},
            "train": {"steps": SETTLING + steps},
            "optim": {"lr": 1e-3},
            "task": "classification",
            "checkpoint": {"every_steps": None, "at_end": False},
            "track": track,
        }
        bigtrain.train(run, model=model, data=Samples())
    # took[i] is from the forward of step SETTLING + i to the next one's; a step logs after its update.
    times = model.times[-steps - 1 :]
    took = [(b - a) * 1e6 for a, b in itertools.pairwise(times)]
    return [took[(place - SETTLING) % every :: every] for place in range(every)]


def added(tracked: list[list[float]], plain: list[list[float]]) -> tuple[float, float, float]:
    """What a step that logs nothing takes longer, what one that logs does, and what a line costs with all after it."""
    median = statistics.median
    quiet, quiet_plain = (median(itertools.chain(*times[1:])) for times in (tracked, plain))
    by_place = [median(a) - median(b) for a, b in zip(tracked, plain, strict=True)]
    return quiet - quiet_plain, by_place[0], sum(by_place)


def main() -> None:
    """Print what is added, for each round and as medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines of numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    costs: list[tuple[float, float, float]] = []
    with_them = {**WITH, "log_every": arguments.every}
    for number in range(arguments.rounds):
        order = (with_them, WITHOUT) if number % 2 == 0 else (WITHOUT, with_them)
        found = {id(track): measure(track, arguments.steps, arguments.every) for track in order}
        plain = found[id(WITHOUT)]
        costs.append(added(found[id(with_them)], plain))
        took = statistics.median(itertools.chain(*plain))
        print(f"round {number}: a step takes {took:.0f} µs; added", ", ".join(f"{cost:+.1f}" for cost in costs[-1]))
    print(f"\ntorch {torch.__version__}, {arguments.rounds} rounds of {arguments.steps} steps, one thread\n")
    print("| | median | lowest | highest |\n|---|---|---|---|")
    names = ("a step that logs nothing", "a step that logs", "a line altogether, with the steps up to the next")
    for name, values in zip(names, zip(*costs, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):+.1f} µs | {min(values):+.1f} | {max(values):+.1f} |")


if __name__ == "__main__":
    main()
