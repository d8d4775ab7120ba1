"""A loss or a gradient that is not finite: noticed without making the device wait, agreed by all ranks, explained.

The engine has left the weights alone already, on every rank, because loss and norm are those of the whole global
batch. Here it is read, one step later on a GPU, and told to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.dist import World
from bigtrain.errors import NonFiniteError
from bigtrain.protocols import Batch, Task


@dataclass(frozen=True)
class _Seen:
    step: int
    skipped: Tensor | bool
    ready: Any  # torch.cuda.Event or None
    microbatches: Sequence[Batch]


class NonFiniteWatch:
    """Reads whether a step was skipped, a step late where the device would have to be waited for.

    Args:
        world: The ranks.
        policy: `stop` raises, `skip` counts and goes on.
    """

    def __init__(self, world: World, policy: str) -> None:
        self._world = world
        self._policy = policy
        self._before: _Seen | None = None
        self.num_skipped = 0

    def observe(self, step: int, skipped: Tensor | bool, microbatches: Sequence[Batch]) -> _Seen | None:
        """Take note of a step, and return one that was skipped and must stop the run, if any.

        Args:
            step: The step just taken, from 0.
            skipped: What the engine said of it, shape ().
            microbatches: What this rank computed in it.
        """
        if isinstance(skipped, bool):
            return self._judge(_Seen(step, skipped, None, microbatches)) if skipped else None
        host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(skipped, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._before = self._before, _Seen(step, host, event, microbatches)
        return self._judge(before) if before else None

    def last(self) -> _Seen | None:
        """Judge what is still under way, at the end."""
        before, self._before = self._before, None
        return self._judge(before) if before else None

    def _judge(self, seen: _Seen) -> _Seen | None:
        if seen.ready is not None:
            seen.ready.synchronize()
        if not seen.skipped:
            return None
        self.num_skipped += 1
        return seen if self._policy == "stop" else None


def explain(
    seen: _Seen,
    world: World,
    model: nn.Module,
    task: Task,
    computing: Callable[[], AbstractContextManager[object]],
    summing: Callable[[], AbstractContextManager[object]],
    backward: Callable[[Batch], None],
) -> NonFiniteError:
    """Find out which rank and samples gave a loss or a gradient that is not finite. Every rank must call it.

    The forward passes of the step are run again without gradients and, where all losses are finite, the backward
    passes; the weights are still those it was computed with, except on a GPU, where the next step was taken before
    this one could be read.

    Args:
        seen: The step.
        world: The ranks.
        model: What the engine's forward is called by.
        task: Says what the loss is.
        computing: Is around what is computed, as it was in the step; gradients are not summed where that can wait.
        summing: The same where they are summed: a model in shards has no gradients before.
        backward: Adds the gradient of a microbatch.
    """
    with computing():
        mine = [_samples(b) for b in seen.microbatches if not _loss_is_finite(model, task, b)]
    found = world.all_gather_object(mine)
    lines = [f"rank {rank}: samples {_shorten(samples)}" for rank, bad in enumerate(found) for samples in bad]
    cause = "the loss is not finite"
    if not lines:
        cause = "the gradient is not finite, though the loss is"
        gradients = world.all_gather_object(_bad_gradients(model, seen.microbatches, computing, backward))
        if not any(gradients) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            names = world.all_gather_object(_bad_gradients(model, seen.microbatches[-1:], summing, backward))
            gradients = [bad and f"{bad.partition(', samples')[0]}, of all ranks' samples" for bad in names]
        lines = [f"rank {rank}: {bad}" for rank, bad in enumerate(gradients) if bad]
    return NonFiniteError(
        f"{cause} in step {seen.step + 1}, which changed no weights",
        where="; ".join(lines) or None,
        remedy="look at the samples named here, lower optim.lr or set optim.clip_grad_norm;\n"
        "health.on_nonfinite=skip leaves out such steps and goes on",
    )


def _bad_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    computing: Callable[[], AbstractContextManager[object]],
    backward: Callable[[Batch], None],
) -> str | None:
    """The parameters whose gradients are not finite in the first microbatch that has any, and its samples.

    An engine that reduces gradients at once has the same ones on all ranks, of its own shards; DeepSpeed keeps them to
    itself. Every rank runs all of its microbatches, as ranks may wait for one another in each.
    """
    named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    for parameter in named.values():
        parameter.grad = None
    found = None
    for batch in batches:
        with computing():
            backward(batch)
        bad = [name for name, p in named.items() if p.grad is not None and not _local(p.grad).isfinite().all()]
        if bad and found is None:
            more = f" … ({len(bad)} in all)" if len(bad) > 3 else ""
            found = f"{', '.join(bad[:3])}{more}, samples {_shorten(_samples(batch))}"
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _samples(batch: Batch) -> list[int]:
    return list(batch.indices[: batch.num_valid])


def _loss_is_finite(model: nn.Module, task: Task, batch: Batch) -> bool:
    with torch.no_grad():
        return bool(task.loss(model, batch).total.isfinite().item())


def _shorten(samples: Sequence[int]) -> str:
    text = ", ".join(str(index) for index in samples[:16])
    return text + (f" … ({len(samples)} in all)" if len(samples) > 16 else "")
