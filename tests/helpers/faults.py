"""Faults for `bigtrain parity` to find, each a context that is in force on every rank under test, in every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import bigtrain.data.loader
import bigtrain.optim
import bigtrain.parity.compare
import bigtrain.trainer
from bigtrain.engines.base import TorchEngine
from bigtrain.loop import train_step
from bigtrain.protocols import LossSum
from bigtrain.state import WEIGHT


@contextmanager
def _in_force(holder: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    """Put something wrong in a place. One that nothing came upon is no fault, and proves nothing: an error."""
    is_met = False

    def met(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_met
        is_met = True
        return wrong(*args, **kwargs)

    with patch.object(holder, name, met):
        yield
    if not is_met:
        raise AssertionError(f"the fault in {name} was planted where nothing passes")


class _Enlarged(torch.autograd.Function):
    """What it is given; its gradient is 1 % larger."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


@contextmanager
def gradients_off_by_one_percent() -> Iterator[None]:
    """The loss that is reported is right."""

    class Wrong:
        def __init__(self, task: Any) -> None:
            self._task = task

        def loss(self, model: Any, batch: Any) -> LossSum:
            right = self._task.loss(model, batch)
            return LossSum(_Enlarged.apply(right.total), right.count)

    def wrong(engine: Any, task: Any, microbatches: Any, lr_scale: float) -> Any:
        return train_step(engine, Wrong(task), microbatches, lr_scale)

    with _in_force(bigtrain.parity.compare, "train_step", wrong):
        yield


@contextmanager
def dropped_microbatch() -> Iterator[None]:
    def wrong(engine: Any, task: Any, microbatches: Any, lr_scale: float) -> Any:
        return train_step(engine, task, microbatches[:-1] or microbatches, lr_scale)

    with _in_force(bigtrain.parity.compare, "train_step", wrong):
        yield


@contextmanager
def clipping_per_rank() -> Iterator[None]:
    """Each rank clips by the norm of its own shards; the norm it reports is right."""
    update = TorchEngine._update

    def wrong(self: Any, gradients: Any, divisor: Any, skipped: Any) -> None:
        own = float(TorchEngine._squared_norm(self, gradients).sqrt())
        count = 16 if divisor > 10 else 4  # the last step of an epoch is short
        update(self, gradients, count * max(own / count / 0.5, 1.0), skipped)

    with _in_force(TorchEngine, "_update", wrong):
        yield


@contextmanager
def clipping_per_rank_in_deepspeed() -> Iterator[None]:
    """The same inside DeepSpeed, by each of its groups."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    clip = DeepSpeedZeroOptimizer.unscale_and_clip_grads

    def wrong(self: Any, gradients: list[Tensor], norm: Any) -> None:
        clip(self, gradients, gradients[0].norm())

    with _in_force(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", wrong):
        yield


@contextmanager
def decay_on_norms() -> Iterator[None]:
    with _in_force(bigtrain.optim, "norm_and_bias", lambda model: set()):
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

    with _in_force(bigtrain.data.loader, "shuffled", wrong):
        yield


@contextmanager
def frozen_parameter_that_moves() -> Iterator[None]:
    def wrong(engine: Any, *arguments: Any) -> Any:
        state = engine.state()
        for piece in state.pieces:
            if piece.kind == WEIGHT and piece.name not in state.hyper:
                piece.data.mul_(1 + 1e-6)
        return train_step(engine, *arguments)

    with _in_force(bigtrain.parity.compare, "train_step", wrong):
        yield


@contextmanager
def learning_rate_off_by_one_step() -> Iterator[None]:
    make_schedule = bigtrain.trainer.make_schedule

    def wrong(*args: Any, **kwargs: Any) -> Any:
        right = make_schedule(*args, **kwargs)
        return lambda step: right(step + 1)

    with _in_force(bigtrain.trainer, "make_schedule", wrong):
        yield
