"""A small run that has everything a resume can get wrong, its trace, and ways to break it off."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bigtrain
from bigtrain.progress import StepInfo
from bigtrain.tracking.reading import read_rows

STEPS = 12


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A gpt with a tied embedding, a frozen part, dropout, groups, accumulation, and short batches at ends of epochs.

    47 bytes of context 4 make 11 windows: an epoch is three steps of 4 samples, the last of them of 3.
    """
    text = folder / "text.txt"
    if not text.exists():  # ranks write it at once and may be killed meanwhile: it is there whole, or not
        partial = folder / f"text.{os.getpid()}.partial"
        partial.write_text("the quick brown fox jumps over the lazy dog, so\n"[:47])
        partial.replace(text)
    gpt = {"vocab": 257, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 4}
    return {
        "run": {"name": "run", "dir": str(folder / "runs"), "seed": 3},
        "task": "causal_lm",
        "model": {"name": "gpt", "args": {**gpt, "tied": True, "dropout": 0.1}},
        "data": {
            "name": "text",
            "args": {"source": str(text), "context": 4},
            "eval": "none",
            "batch_size": 4,
            "workers": 0,
        },
        "train": {"steps": STEPS, "micro_batch_size": 1},
        "optim": {
            "lr": 0.01,
            "weight_decay": 0.1,
            "clip_grad_norm": 0.5,
            "groups": [{"match": "*attention*", "lr": 0.003}],
            "schedule": {"name": "cosine", "warmup_steps": 2},
        },
        "finetune": {"freeze": ["layers.0.mlp.*"]},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none"},
        **changes,
    }


class BrokenOffError(Exception):
    """What ends a run from inside, as a bug in a hook would."""


class Trace:
    """What a run did, step by step, to the last bit; the last writer of a step wins."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Any, ...]] = {}

    def __call__(self, info: StepInfo) -> None:
        generators = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
        digest = hashlib.sha256(repr(generators).encode()).hexdigest()
        lrs = [lr.hex() for lr in info.lr]
        self.steps[info.step] = (info.loss.hex(), info.grad_norm.hex(), lrs, info.epoch, info.samples_seen, digest)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: what is compared to the last bit needs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def break_off(at: int) -> Callable[[StepInfo], None]:
    """A hook that raises after a step."""

    def hook(info: StepInfo) -> None:
        if info.step == at:
            raise BrokenOffError

    return hook


def stop(at: int) -> Callable[[StepInfo], None]:
    """A hook that asks all ranks to stop after a step."""
    return lambda info: info.stop() if info.step == at else None


def losses(run: bigtrain.Run | Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of the merged series."""
    path = run if isinstance(run, Path) else run.path
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(path) if "loss" in row]
