"""What an evaluation measures, counted by torchmetrics: imported when the first evaluation needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MulticlassStatScores,
)

from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.labels import check_labels
from bigtrain.tasks.metrics import SizedMetrics, summed_over_ranks
from bigtrain.tasks.tensors import valid_part

# Up to here there is a confusion matrix among the results (32 MiB).
_MATRIX_CLASSES = 2048


class ClassificationMetrics(SizedMetrics):
    """Accuracy, macro precision, recall and F1, recall by class, confusion matrix by label and prediction.

    Predictions and labels are kept, 16 bytes a sample, and counted when results are computed. At every update
    torchmetrics would fill a matrix of classes × classes, and wait for the device several times.

    Args:
        num_classes: How many classes there are; the first microbatch tells if it is left out.
        ignored: A label whose samples do not count.
    """

    def __init__(self, num_classes: int | None, ignored: int) -> None:
        super().__init__(num_classes)
        self._ignored = ignored
        self._uncounted: list[Tensor] = []  # each (2, n): predictions, labels
        self._indices: list[int] = []

    def update(self, result: LossSum, batch: Batch) -> None:
        """Add one microbatch; samples of weight 0 do not count."""
        assert result.preds is not None
        assert result.target is not None
        logits, labels = valid_part(result.preds, batch), valid_part(result.target, batch)
        self._size = logits.shape[1]
        self._uncounted.append(torch.stack((logits.argmax(dim=1), labels.long())))
        self._indices.extend(batch.indices[: batch.num_valid])

    def compute(self) -> dict[str, Any]:
        """Sum over all ranks; return floats, and tensors on the host, by name. Every rank must call it.

        Raises:
            DataError: Naming the sample whose label is outside the classes.
        """
        if self._uncounted:
            predicted, labels = torch.cat(self._uncounted, dim=1)
            check_labels(labels, self._size, self._ignored, self._indices)
            state = self._sized(self._size)
            if len(labels):
                with _counting():
                    state.update(predicted, labels)
            self._uncounted.clear()
            self._indices.clear()
        return super().compute()

    def _make(self, size: int) -> MetricCollection:
        args: dict[str, Any] = {
            "num_classes": size,
            "ignore_index": self._ignored,
            "validate_args": False,  # it would look for wrong labels less thoroughly than `compute` does
            "dist_sync_fn": summed_over_ranks,
        }
        scores: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(average="micro", **args),
            "precision": Precision(average="macro", **args),
            "recall": Recall(average="macro", **args),
            "f1": F1Score(average="macro", **args),
            # A class that was never a label has no recall.
            "recall_per_class": Recall(average=None, zero_division=math.nan, **args),
        }
        for score in scores.values():
            score.set_dtype(torch.float64)  # torchmetrics divides in the dtype of its sums, integers in float32
        if size <= _MATRIX_CLASSES:
            scores["confusion_matrix"] = MulticlassConfusionMatrix(**args)
        collection = MetricCollection(scores)
        # A sample that does not count, as torchmetrics cannot take none.
        collection.update(torch.tensor([0]), torch.tensor([self._ignored]))
        return collection


class _CountedByClass(MulticlassStatScores):
    """Counts each class for itself; torchmetrics fills a matrix of classes × classes, which 100,000 make 80 GB of."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predicted classes and labels, each (n,)."""
        counted = target != self.ignore_index
        preds, target = preds[counted], target[counted]
        right, taken, there = (
            torch.bincount(each, minlength=self.num_classes or 0) for each in (target[preds == target], preds, target)
        )
        self._update_state(right, taken - right, len(target) - taken - there + right, there - right)


class Precision(_CountedByClass, MulticlassPrecision):
    """The share of right ones among those taken for a class."""


class Recall(_CountedByClass, MulticlassRecall):
    """The share of a class that was found."""


class F1Score(_CountedByClass, MulticlassF1Score):
    """The harmonic mean of both."""


@contextmanager
def _counting() -> Iterator[None]:
    """Let torchmetrics count by `bincount`, which is exact for integers on any device.

    Under deterministic algorithms it compares each sample with each cell of the matrix instead: 400 GB for
    50,000 samples and 1,000 classes.
    """
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)


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
