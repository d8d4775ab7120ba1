"""What tracking adds to a step: to one that logs nothing, and to one that logs, with W&B offline and TensorBoard.

    python benchmarks/tracking.py [--runs 3] [--blocks 8] [--every 10]

A small model is trained with every tracker, in one thread; steps in which lines of numbers are due and written take
turns with steps in which they are not, in blocks (A B B A), of which the first third is left out: what the trackers'
process does of the block before. The time of a step is the time between two calls of the model's forward; those in
which the trackers' process starts are not counted. Two runs in one process differ by more than what is to be measured:
so both kinds of steps are of one run.

What is added is the difference of the medians, of the steps that log nothing and of those that log; and what a line
costs altogether is the sum over the step that logs and those up to the next, as the first of them find their data and
code in no cache.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from overhead import Samples, Timed

import bigtrain
from bigtrain.loop import Loop

SETTLING = 10_000  # steps, three seconds: importing W&B and starting its service takes one or two
BLOCK = 6_000  # steps
TRACK = {"wandb": "offline", "tensorboard": True, "progress": "plain", "report": False}

Times = list[list[float]]  # in microseconds: of the steps that log, of the first after each of them, and so on


def is_logged(step: int) -> bool:
    """Whether the lines of this step are written: A B B A, in blocks."""
    return step < SETTLING or (step - SETTLING) // BLOCK % 4 in (0, 3)


@contextmanager
def lines_in_turns() -> Iterator[None]:
    """Leave out the lines of every other block."""
    log = Loop._log

    def log_or_not(self: Loop, *args: Any, **options: Any) -> None:
        if is_logged(self.outcome.steps):
            log(self, *args, **options)

    Loop._log = log_or_not  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop._log = log  # type: ignore[method-assign]


def measure(blocks: int, every: int) -> tuple[Times, Times]:
    """The times of steps with lines of numbers, and without."""
    torch.manual_seed(0)
    model, count = Timed(), blocks * BLOCK
    with tempfile.TemporaryDirectory() as folder, lines_in_turns():
        run = {
            "run": {"dir": folder, "name": "it"},
            "data": {"batch_size": 32, "eval": "none"},
            "train": {"steps": SETTLING + count},
            "optim": {"lr": 1e-3},
            "task": "classification",
            "checkpoint": {"every_steps": None, "at_end": False},
            "track": {**TRACK, "log_every": every},
        }
        bigtrain.train(run, model=model, data=Samples())
    logged: Times = [[] for _ in range(every)]
    plain: Times = [[] for _ in range(every)]
    # From the forward of a step to the next one's; a step logs after its update.
    for number, (before, after) in enumerate(itertools.pairwise(model.times[-count - 1 :])):
        if number % BLOCK >= BLOCK // 3:
            times = logged if is_logged(SETTLING + number) else plain
            times[number % every].append((after - before) * 1e6)
    return logged, plain


def added(logged: Times, plain: Times) -> tuple[float, float, float]:
    """What a step that logs nothing takes longer, what one that logs does, and what a line costs with all after it."""
    median = statistics.median
    quiet, quiet_plain = (median(itertools.chain(*times[1:])) for times in (logged, plain))
    by_place = [median(a) - median(b) for a, b in zip(logged, plain, strict=True)]
    return quiet - quiet_plain, by_place[0], sum(by_place)


def main() -> None:
    """Print what is added, for each run and as medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=8, help=f"of {BLOCK:,} steps, in a run")
    parser.add_argument("--every", type=int, default=10, help="steps between two lines of numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    costs: list[tuple[float, float, float]] = []
    for number in range(arguments.runs):
        logged, plain = measure(arguments.blocks, arguments.every)
        costs.append(added(logged, plain))
        took = statistics.median(itertools.chain(*plain))
        print(f"run {number}: a step takes {took:.0f} µs; added", ", ".join(f"{cost:+.1f}" for cost in costs[-1]))
    print(f"\ntorch {torch.__version__}, {arguments.runs} runs of {arguments.blocks} × {BLOCK} steps, one thread\n")
    print("| | median | lowest | highest |\n|---|---|---|---|")
    names = ("a step that logs nothing", "a step that logs", "a line altogether, with the steps up to the next")
    for name, values in zip(names, zip(*costs, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):+.1f} µs | {min(values):+.1f} | {max(values):+.1f} |")


if __name__ == "__main__":
    main()
