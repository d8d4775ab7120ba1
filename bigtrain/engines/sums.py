"""The sums of one step, and what they mean: mean loss, gradient norm, what to divide the gradients by.

The arithmetic stands here twice, once for a device that nobody may wait for, once in Python's own numbers: a dozen
operations on tensors of one element cost more on a CPU than a small model's whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.protocols import LossSum

# torch.nn.utils.clip_grads_with_norm_ adds this to the norm; the same here, so that clipping is torch's to the last
# bit.
_CLIP_EPSILON = 1e-6
# A global batch without a single target divides zero by this instead of by zero.
_LEAST_COUNT = 1e-30

# Elements whose norm on the host is exact enough in float32: measured, 65,536 give 1e-7.
_NORM_CHUNK = 1 << 16

Reduce = Callable[[Tensor], Tensor]


class StepResult(NamedTuple):
    """What one optimizer step did, the same on every rank.

    On a GPU each is a tensor of shape () that has not been waited for; on a CPU a plain number.

    Attributes:
        loss: The mean over all targets of the global batch, float64.
        norm: The gradient's norm before clipping, float64.
        skipped: Whether loss or norm was not finite, so that the weights were left as they were.
    """

    loss: Tensor | float
    norm: Tensor | float
    skipped: Tensor | bool


class DeviceSums:
    """Sums that stay on the device.

    Args:
        device: Where the losses are.
        clip: The largest norm a gradient may have; None leaves it.
    """

    def __init__(self, device: torch.device, clip: float | None) -> None:
        self._clip = clip
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, count

    def add(self, result: LossSum) -> None:
        """Add a microbatch."""
        self._sums[0] += result.total.detach()
        self._sums[1] += result.count

    def weigh(self, squared: Tensor, reduce: Reduce) -> tuple[StepResult, Tensor]:
        """End the step: sum over ranks, and say what it comes to and what its gradients are to be divided by.

        Args:
            squared: This rank's part of the squared norm of the gradient sum, shape ().
            reduce: Sums squared norm, loss and count (3,) over ranks.
        """
        sums = reduce(torch.cat((squared.double().reshape(1).to(self._sums.device), self._sums)))
        self._sums.zero_()
        squared, loss, count = sums.unbind()
        count = count.clamp_min(_LEAST_COUNT)
        loss, norm = loss / count, squared.sqrt() / count
        divisor = count if self._clip is None else count * ((norm + _CLIP_EPSILON) / self._clip).clamp_min(1.0)
        return StepResult(loss, norm, (loss + norm).isfinite().logical_not()), divisor


class EarlySums:
    """Loss and count alone, summed over ranks while the last backward of the step runs.

    For an engine whose own step knows the norm: both are known before that backward begins, and nobody waits for them.

    Args:
        device: Where the losses are.
        start: Starts summing a tensor over ranks, and returns what waits for it.
    """

    def __init__(self, device: torch.device, start: Callable[[Tensor], Callable[[], object]]) -> None:
        self._start = start
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, count
        self._wait: Callable[[], object] = lambda: None

    def add(self, result: LossSum, *, last: bool) -> None:
        """Add a microbatch; the last one of a step sends the sums off."""
        self._sums[0] += result.total.detach()
        self._sums[1] += result.count
        if last:
            self._wait = self._start(self._sums)

    def finish(self) -> tuple[float, float]:
        """End the step: the mean loss over all ranks, and the count. Waits for the device."""
        self._wait()
        loss, count = self._sums.tolist()
        self._sums.zero_()
        count = at_least_something(count)
        return loss / count, count


class HostSums:
    """The same as `DeviceSums`, on a CPU.

    Args:
        clip: The largest norm a gradient may have; None leaves it.
        alone: Whether there is nobody to sum with.
    """

    def __init__(self, clip: float | None, *, alone: bool) -> None:
        self._clip = clip
        self._alone = alone
        self._loss = self._count = 0.0

    def add(self, result: LossSum) -> None:
        """Add a microbatch."""
        self._loss += result.total.item()
        self._count += float(result.count)

    def weigh(self, squared: Tensor, reduce: Reduce) -> tuple[StepResult, float]:
        """End the step, as `DeviceSums.weigh` does."""
        sums = [squared.item(), self._loss, self._count]
        if not self._alone:
            sums = reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        self._loss = self._count = 0.0
        count = at_least_something(sums[2])
        loss, norm = sums[1] / count, math.sqrt(sums[0]) / count
        divisor = count if self._clip is None else count * max((norm + _CLIP_EPSILON) / self._clip, 1.0)
        return StepResult(loss, norm, not math.isfinite(loss + norm)), divisor


def at_least_something(count: float) -> float:
    """What the gradients are divided by where a global batch has so many targets."""
    return max(count, _LEAST_COUNT)


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Of all their elements, on a host."""
    chunks = in_chunks(tensors)
    norms = torch.stack(torch._foreach_norm(chunks)).tolist() if chunks else ()
    return math.fsum(norm * norm for norm in norms)


def in_chunks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Large tensors on the host in views of a size whose float32 norm torch computes to the last bits.

    Over 4 million elements it is off by 1e-4, which then depends on how the tensor is sharded.
    """
    chunks: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() > _NORM_CHUNK and tensor.device.type == "cpu":
            chunks.extend(torch.split(tensor.reshape(-1), _NORM_CHUNK))
        else:
            chunks.append(tensor)
    return chunks
