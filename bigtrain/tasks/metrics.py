"""What the metrics of several tasks share: states that are sums, added up exactly over ranks.

torchmetrics gathers every rank's state on every rank and sums then; here sums are reduced at once, which
needs one state's memory for any number of ranks. Counts are integers and sums are float64, so the order of
ranks does not matter beyond their last bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.tensors import valid_part


def summed_over_ranks(state: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """A state's sum over all ranks, as the list of parts that torchmetrics' `dist_sync_fn` returns."""
    total = state.clone()
    dist.all_reduce(total, group=group)
    return [total]


class LossMean(Metric):
    """The mean loss over all targets that count."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=summed_over_ranks)
        for state in ("total", "count"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, result: LossSum) -> None:
        """Add one microbatch."""
        self.total += result.total
        self.count += result.count

    def compute(self) -> dict[str, Tensor]:
        """The mean, and the number of targets."""
        return {"loss": self.total / self.count, "count": self.count}


class SizedMetrics(ABC):
    """Metrics that compare predictions with targets, in a state whose size the first microbatch tells.

    A rank that saw no microbatch learns the size from the others when results are computed.

    Args:
        size: The predictions' second dimension, where it is known.
    """

    def __init__(self, size: int | None = None) -> None:
        self._device = torch.device("cpu")
        self._size = size or 0
        self._state: Metric | MetricCollection | None = None

    @abstractmethod
    def _make(self, size: int) -> Metric | MetricCollection:
        """A state for predictions (n, size), to which no samples have been added, by one update."""

    def _sized(self, size: int) -> Metric | MetricCollection:
        if self._state is None:
            self._size, self._state = size, self._make(size).to(self._device)
        return self._state

    def to(self, device: torch.device) -> SizedMetrics:
        """Move the accumulated state."""
        self._device = device
        if self._state is not None:
            self._state.to(device)
        return self

    def update(self, result: LossSum, batch: Batch) -> None:
        """Add one microbatch; samples of weight 0 do not count."""
        assert result.preds is not None
        assert result.target is not None
        preds, target = valid_part(result.preds, batch), valid_part(result.target, batch)
        self._sized(preds.shape[1]).update(preds, target)

    def compute(self) -> dict[str, Any]:
        """Sum over all ranks; return floats, and tensors on the host, by name. Every rank must call it.

        Returns:
            Nothing where no rank saw a microbatch.
        """
        size = self._largest_size()
        if not size:
            return {}
        results: dict[str, Tensor] = self._sized(size).compute()
        return {name: value.item() if value.ndim == 0 else value.cpu() for name, value in results.items()}

    def _largest_size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return self._size
        size = torch.tensor(self._size, device=self._device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
        return int(size)
