"""Classification: one label out of several for each sample.

Cross-entropy with label smoothing and class weights, by torch's own definitions; accuracy and macro averages
from one confusion matrix of integers, so that they do not depend on how samples were spread over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from bigtrain.errors import DataError, ModelError, UserError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.inspection import pair, sample, try_on
from bigtrain.tasks.metrics import SizedMetrics, summed_over_ranks
from bigtrain.tasks.tensors import at_least_fp32, describe, mismatch, outputs, valid_part

# torch ignores the label -100 unless told otherwise; where the user ignores none, this one cannot come by
# mistake.
_NO_LABEL = -(2**62)

# Up to here the confusion matrix is kept (32 MiB); beyond, three counts a class.
_MATRIX_CLASSES = 2048


class Classification:
    """Batches are (inputs, labels): what the model takes, and integers (B,). It returns logits (B, classes).

    Args:
        num_classes: How many classes there are; the model's outputs tell if it is left out.
        label_smoothing: The share of each target that is spread evenly over all classes.
        class_weights: A weight for each class. The loss is the weighted mean as in torch: the count of a
            sample is the weight of its label.
        ignore_index: A label whose samples count in no loss and no metric.

    Raises:
        UserError: Where an argument cannot be meant.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        _check_arguments(num_classes, label_smoothing, class_weights)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        self.ignore_index = ignore_index
        self._weights: Tensor | None = None  # class_weights where the logits are

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The sum of the cross-entropies, and of what they count.

        Raises:
            DataError: On CPU, naming the sample whose label is outside the classes. Elsewhere looking would
                wait for the device: the loss of that microbatch becomes NaN.
            ModelError: Where the outputs are not logits for each label.
        """
        inputs, labels = batch.data
        logits = outputs(model(inputs))
        if logits.ndim != 2 or logits.shape[:1] != labels.shape:
            raise mismatch(logits, labels)
        valid = at_least_fp32(valid_part(logits, batch)), valid_part(labels, batch).long()
        try:
            total, count = self._sums(*valid) if logits.device.type == "cpu" else self._guarded_sums(*valid)
        except IndexError:
            self._check_labels(labels, logits.shape[1], batch)
            raise
        return LossSum(total, count, preds=logits, target=labels)

    def _sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        weights = self._weights_like(logits)
        ignored = _NO_LABEL if self.ignore_index is None else self.ignore_index
        total = F.cross_entropy(
            logits,
            labels,
            weight=weights,
            ignore_index=ignored,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if weights is None and self.ignore_index is None:
            return total, float(len(labels))
        counted = labels != ignored
        if weights is None:
            return total, counted.sum()
        return total, (weights[labels.where(counted, 0)] * counted).sum()

    def _guarded_sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        """The sums without waiting for the device; the total is NaN where a label is outside the classes.

        CUDA's own answer to such a label ends every later call of the process, and names no reason.
        """
        is_class = _is_class(labels, logits.shape[1])
        known = is_class if self.ignore_index is None else is_class | (labels == self.ignore_index)
        total, count = self._sums(logits, labels.where(known, 0))
        return torch.where(known.all(), total, math.nan), count

    def _weights_like(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        kept = self._weights
        if kept is None or (kept.device, kept.dtype) != (logits.device, logits.dtype):
            self._weights = torch.tensor(self.class_weights, device=logits.device, dtype=logits.dtype)
        return self._weights

    def metrics(self) -> ClassificationMetrics:
        """A fresh accumulator for one evaluation."""
        return ClassificationMetrics(self.num_classes, self.ignore_index)

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse data and models that do not fit, by one batch on the host.

        Raises:
            DataError: Where there are no integer labels within the classes, or the model cannot take the
                inputs.
            ModelError: Where the model's outputs are not logits of as many classes as were asked for.
        """
        inputs, labels = pair(batch, "input, label")
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"labels are {describe(labels)}, and classification needs one integer for each sample",
                where="data",
                remedy="give class numbers from 0; for numbers to be predicted use the task regression",
            )
        logits = outputs(try_on(model, inputs))
        if logits.ndim != 2 or len(logits) != len(labels):
            raise ModelError(
                f"the model returns {describe(logits)} for {len(labels)} samples",
                where="model",
                remedy="return logits (samples, classes)",
            )
        self._check_classes(logits.shape[1])
        self._check_labels(labels, logits.shape[1], batch)

    def _check_classes(self, num_outputs: int) -> None:
        if self.num_classes not in (None, num_outputs):
            raise ModelError(
                f"the model has {num_outputs} outputs for {self.num_classes} classes",
                where="task.args.num_classes",
                remedy="let model.args.num_classes and task.args.num_classes agree",
            )
        if self.class_weights is not None and len(self.class_weights) != num_outputs:
            raise UserError(
                f"there are {len(self.class_weights)} class weights for {num_outputs} classes",
                where="task.args.class_weights",
                remedy="give one for each output of the model",
            )

    def _check_labels(self, labels: Tensor, num_classes: int, batch: Batch) -> None:
        known = _is_class(labels, num_classes)
        if self.ignore_index is not None:
            known |= labels == self.ignore_index
        for position in (~known[: batch.num_valid]).nonzero().flatten().tolist():
            raise DataError(
                f"label {labels[position]} of {sample(batch, position)} is none of the {num_classes} classes "
                f"0 to {num_classes - 1}",
                where="data",
                remedy="correct the labels, give the model more outputs (model.args.num_classes),\n"
                "or leave samples with that label out by task.args.ignore_index",
            )


def _is_class(labels: Tensor, num_classes: int) -> Tensor:
    return (labels >= 0) & (labels < num_classes)


def _check_arguments(num_classes: object, label_smoothing: object, class_weights: object) -> None:
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        remedy = "give a whole number of at least 1"
        raise UserError(f"num_classes is {num_classes!r}", where="task.args.num_classes", remedy=remedy)
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        where = "task.args.label_smoothing"
        raise UserError(f"label_smoothing is {label_smoothing!r}", where=where, remedy="give a share, 0 to 1")
    if class_weights is not None and not isinstance(class_weights, Sequence):
        where, remedy = "task.args.class_weights", "give a list of numbers, one for each class"
        raise UserError(f"class_weights is {class_weights!r}", where=where, remedy=remedy)
    for weight in class_weights or ():
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            where, remedy = "task.args.class_weights", "give a list of numbers, 0 or more, one for each class"
            raise UserError(f"{weight!r} is among the class weights", where=where, remedy=remedy)


class ClassCounts(Metric):
    """How often each class was the label, was predicted, and was both.

    Attributes:
        counts: int64; (classes, classes), by label and prediction, or, for many classes, (3, classes): right,
            predicted, label.
    """

    counts: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__(dist_sync_fn=summed_over_ranks)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.has_matrix = num_classes <= _MATRIX_CLASSES
        rows = num_classes if self.has_matrix else 3
        zeros = torch.zeros(rows, num_classes, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add samples: logits (n, classes), labels (n,). Labels that are ignored or no class are left out."""
        counted = _is_class(labels, self.num_classes)
        if self.ignore_index is not None:
            counted &= labels != self.ignore_index
        labels, predicted, ones = labels.where(counted, 0).long(), logits.argmax(dim=1), counted.long()
        # index_add_ of integers: bincount would wait for the device
        if self.has_matrix:
            self.counts.view(-1).index_add_(0, labels * self.num_classes + predicted, ones)
        else:
            right = ones * (labels == predicted)
            for row, (classes, amount) in enumerate(((labels, right), (predicted, ones), (labels, ones))):
                self.counts[row].index_add_(0, classes, amount)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy, macro precision, recall and F1, each class's recall, and the confusion matrix if kept."""
        if not self.has_matrix:
            return class_scores(*self.counts)
        scores = class_scores(self.counts.diagonal(), self.counts.sum(0), self.counts.sum(1))
        return {**scores, "confusion_matrix": self.counts}


def class_scores(right: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, Tensor]:
    """Scores in float64 from counts for each class.

    As in torchmetrics, macro averages are over the classes that were a label or a prediction, and a ratio
    over nothing is 0. A class that was never a label has no recall of its own: NaN.

    Args:
        right: (classes,) how often it was rightly predicted.
        predicted: (classes,) how often it was predicted.
        actual: (classes,) how often it was the label.
    """
    right, predicted, actual = right.double(), predicted.double(), actual.double()
    seen = (predicted + actual) > 0
    return {
        "accuracy": right.sum() / actual.sum(),
        "precision": (right / predicted.clamp(min=1))[seen].mean(),
        "recall": (right / actual.clamp(min=1))[seen].mean(),
        "f1": (2 * right / (predicted + actual).clamp(min=1))[seen].mean(),
        "recall_per_class": right / actual,
    }


class ClassificationMetrics(SizedMetrics):
    """Accuracy, macro precision, recall and F1, recall by class, confusion matrix by label and prediction."""

    def __init__(self, num_classes: int | None = None, ignore_index: int | None = None) -> None:
        super().__init__(num_classes)
        self._ignore_index = ignore_index

    def _make(self, size: int) -> Metric:
        counts = ClassCounts(size, self._ignore_index)
        counts.update(torch.zeros(0, size), torch.zeros(0, dtype=torch.int64))
        return counts
