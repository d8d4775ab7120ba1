"""Regression: numbers to be predicted for each sample, by least squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, R2Score

from bigtrain.errors import DataError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.inspection import pair, try_on
from bigtrain.tasks.metrics import SizedMetrics, summed_over_ranks
from bigtrain.tasks.tensors import at_least_fp32, describe, mismatch, outputs, valid_part


class Regression:
    """Batches are (inputs, targets): what the model takes, and numbers (B,) or (B, outputs) as it returns.

    The loss is the mean squared error over all numbers.
    """

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The sum of the squared errors, and how many numbers there are.

        Raises:
            ModelError: Where the outputs do not have the targets' shape.
        """
        inputs, targets = batch.data
        preds = _columns(outputs(model(inputs)))
        targets = _columns(targets)
        if preds.shape != targets.shape:
            # Never broadcast: (B,) against (B, 1) would compare every sample with every other.
            raise mismatch(preds, targets)
        valid_preds = at_least_fp32(valid_part(preds, batch))
        valid_targets = valid_part(targets, batch).to(valid_preds.dtype)
        total = F.mse_loss(valid_preds, valid_targets, reduction="sum")
        return LossSum(total, float(valid_preds.numel()), preds=preds, target=targets)

    def metrics(self) -> RegressionMetrics:
        """A fresh accumulator for one evaluation."""
        return RegressionMetrics()

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse data and models that do not fit, by one batch on the host.

        Raises:
            DataError: Where there are no finite targets, or the model cannot take the inputs.
            ModelError: Where the outputs do not have the targets' shape.
        """
        inputs, targets = pair(batch, "input, target")
        if targets.is_complex() or not targets.isfinite().all():
            raise DataError(f"targets {describe(targets)} are not all finite real numbers", where="data")
        preds = outputs(try_on(model, inputs))
        if _columns(preds).shape != _columns(targets).shape:
            raise mismatch(preds, targets)


def _columns(values: Tensor) -> Tensor:
    """Numbers by sample, as (B, outputs)."""
    return values.flatten(1) if values.ndim > 1 else values.reshape(-1, 1)


class R2(R2Score):
    """The coefficient of determination, averaged over outputs.

    torchmetrics takes sums of squared errors below 1e-4 for zero, so that small targets score 1 whatever is
    predicted. Here targets are constant if their deviation is lost in the rounding of its own sum; they score
    1 when hit exactly, else 0. Fewer than two samples score NaN.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__(dist_sync_fn=summed_over_ranks)
        for state in ("sum_squared_error", "sum_error", "residual"):
            # torchmetrics learns the number from the data, and ranks without data would not.
            self.add_state(state, torch.zeros(num_outputs), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The score, float64."""
        spread = self.sum_squared_error - self.sum_error**2 / self.total
        is_constant = spread <= 64 * torch.finfo(torch.float64).eps * self.sum_squared_error
        if_constant = (self.residual == 0).to(spread.dtype)
        score = torch.where(is_constant, if_constant, 1 - self.residual / spread).mean()
        return score.where(self.total >= 2, math.nan)


class RegressionMetrics(SizedMetrics):
    """Mean squared error, mean absolute error, and R², in float64."""

    def update(self, result: LossSum, batch: Batch) -> None:
        """Add one microbatch; samples of weight 0 do not count."""
        assert result.preds is not None
        assert result.target is not None
        super().update(result._replace(preds=result.preds.double(), target=result.target.double()), batch)

    def _make(self, size: int) -> MetricCollection:
        scores: dict[str, Metric | MetricCollection] = {
            "mse": MeanSquaredError(dist_sync_fn=summed_over_ranks),
            "mae": MeanAbsoluteError(dist_sync_fn=summed_over_ranks),
            "r2": R2(size),
        }
        collection = MetricCollection(scores, compute_groups=False).set_dtype(torch.float64)
        nothing = torch.zeros(0, size, dtype=torch.float64)
        collection.update(nothing, nothing)
        return collection
