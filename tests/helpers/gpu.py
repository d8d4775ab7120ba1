"""Trainings on one GPU, put together as a run file does it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bigtrain import engines
from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.progress import Hook
from bigtrain.trainer import Subject, Training, assemble

# Heads of 64 elements, as flash attention likes them; two share a key and value head.
GPT = {"vocab": 256, "layers": 3, "width": 256, "heads": 4, "kv_heads": 2, "context": 128}
DATA = {"name": "synthetic", "args": {"kind": "causal_lm", "samples": 96, "context": 128, "vocab": 256}}


def gpt_run(engine: str, /, **changes: Any) -> dict[str, Any]:
    """A run file: a small gpt in bf16, three microbatches a step, with nothing to log."""
    run = {
        "task": "causal_lm",
        "model": {"name": "gpt", "args": GPT},
        "data": {**DATA, "eval": "none", "batch_size": 12},
        "train": {"steps": 10_000, "micro_batch_size": 4},
        "precision": "bf16",
        "track": {"log_every": 10_000, "progress": "none"},
        "engine": {"name": engine, "device": "cuda"},
    }
    return run | changes


@contextmanager
def training(run: dict[str, Any], subject: Subject | None = None) -> Iterator[Training]:
    """Everything of a run, on the GPU, in a world of one."""
    config = from_dict(run).config
    with join("cuda", needs_group=engines.needs_group(config.engine.name)) as world:
        built = assemble(config, world, subject or Subject())
        try:
            yield built
        finally:
            built.close()


def steps(built: Training, number: int) -> list[tuple[float, float]]:
    """Loss and norm of the first steps, from the whole loop."""
    seen: list[tuple[float, float]] = []
    loop = built.loop(hooks=[Hook(lambda info: seen.append((info.loss, info.grad_norm)))])
    for _ in range(number):
        loop._one_step()
    return seen


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error if the host waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every kind of waiting is noticed
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plain_weights(built: Training) -> dict[str, Tensor]:
    """Copies of the weights by name, whole, on the host."""
    return {p.name: p.data.to("cpu", copy=True) for p in built.engine.state().pieces if p.kind == "weight"}
