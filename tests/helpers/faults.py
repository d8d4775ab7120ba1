"""Faults for `bigtrain parity` to find, each a context that is in force on every rank under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import bigtrain.data.loader
import bigtrain.optim
import bigtrain.parity.compare
import bigtrain.trainer
from bigtrain.engines.base import TorchEngine
from bigtrain.engines.fsdp import FSDPEngine
from bigtrain.loop import train_step


@contextmanager
def gradients_off_by_one_percent() -> Iterator[None]:
    collect = FSDPEngine._collect_gradients

    def wrong(self: Any) -> Any:
        gradients = collect(self)
        for gradient in gradients:
            gradient *= 1.01
        return gradients

    with patch.object(FSDPEngine, "_collect_gradients", wrong):
        yield


@contextmanager
def dropped_microbatch() -> Iterator[None]:
    def wrong(engine: Any, task: Any, microbatches: Any, lr_scale: float) -> Any:
        return train_step(engine, task, microbatches[:-1] or microbatches, lr_scale)

    with patch.object(bigtrain.parity.compare, "train_step", wrong):
        yield


@contextmanager
def clipping_per_rank() -> Iterator[None]:
    """Each rank clips by the norm of its own shards; the norm it reports is right."""
    update = TorchEngine._update

    def wrong(self: Any, gradients: Any, divisor: Any, skipped: Any) -> None:
        own = float(TorchEngine._squared_norm(self, gradients).sqrt())
        count = 16 if divisor > 10 else 4  # the last step of an epoch is short
        update(self, gradients, count * max(own / count / 0.5, 1.0), skipped)

    with patch.object(TorchEngine, "_update", wrong):
        yield


@contextmanager
def decay_on_norms() -> Iterator[None]:
    with patch.object(bigtrain.optim, "norm_and_bias", lambda model: set()):
        yield


@contextmanager
def two_swapped_samples() -> Iterator[None]:
    """The first samples of the first two steps, exchanged."""
    shuffled = bigtrain.data.loader.shuffled

    def wrong(n: int, seed: int) -> Callable[..., Any]:
        order = shuffled(n, seed)

        def swapped(epochs: Any, positions: Any) -> Any:
            exchanged = np.where(positions == 0, 16, np.where(positions == 16, 0, positions))
            return order(epochs, exchanged)

        return swapped

    with patch.object(bigtrain.data.loader, "shuffled", wrong):
        yield


@contextmanager
def frozen_parameter_that_moves() -> Iterator[None]:
    step = TorchEngine.step

    def wrong(self: Any, lr_scale: float) -> Any:
        with torch.no_grad():
            for name, held in self._weights.items():
                if name not in self._trained:
                    held.local.mul_(1 + 1e-6)
        return step(self, lr_scale)

    with patch.object(TorchEngine, "step", wrong):
        yield


@contextmanager
def learning_rate_off_by_one_step() -> Iterator[None]:
    make_schedule = bigtrain.trainer.make_schedule

    def wrong(*args: Any, **kwargs: Any) -> Any:
        right = make_schedule(*args, **kwargs)
        return lambda step: right(step + 1)

    with patch.object(bigtrain.trainer, "make_schedule", wrong):
        yield
