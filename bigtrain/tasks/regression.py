"""Regression: numbers to be predicted for each sample, by least squares."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.errors import DataError
from bigtrain.protocols import Batch, LossSum, Metrics
from bigtrain.tasks.inspection import pair, try_on
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

    def metrics(self) -> Metrics:
        """A fresh accumulator for one evaluation."""
        from bigtrain.tasks.scores import RegressionMetrics  # torchmetrics takes long to import: not before a step

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
