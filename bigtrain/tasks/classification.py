"""Classification: one label out of several for each sample.

Cross-entropy with label smoothing and class weights, by torch's own definitions; torchmetrics' scores, from
counts that do not depend on how samples were spread over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.errors import DataError, ModelError, UserError
from bigtrain.protocols import Batch, Dataset, LossSum, Metrics
from bigtrain.tasks.inspection import pair, try_on
from bigtrain.tasks.labels import check_labels, is_known
from bigtrain.tasks.pictures import data_uri, is_picture
from bigtrain.tasks.tensors import at_least_fp32, describe, mismatch, outputs, valid_part

# torch ignores the label -100 unless told otherwise; where the user ignores none, this one cannot come by
# mistake.
_NO_LABEL = -(2**62)
_MOST_CLASSES = 20  # that a message names


class Classification:
    """Batches are (inputs, labels): what the model takes, and integers (B,). It returns logits (B, classes).

    Of samples that are mixed (`data.mix`), (inputs, labels, partners, shares): each sample counts as its label by its
    share, and by the rest as its partner's.

    Args:
        num_classes: How many classes there are; the model's outputs tell if it is left out.
        label_smoothing: The share of each target that is spread evenly over all classes.
        class_weights: A weight for each class. The loss is the weighted mean as in torch: the count of a
            sample is the weight of its label. `balanced` takes samples / (classes · samples of the class), by the
            samples to train on.
        ignore_index: A label whose samples count in no loss and no metric.

    Raises:
        UserError: Where an argument cannot be meant.
    """

    takes_mixtures = True

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
        ignore_index: int | None = None,
    ) -> None:
        _check_arguments(num_classes, label_smoothing, class_weights)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self._is_balanced = class_weights == "balanced"
        given = None if class_weights is None or isinstance(class_weights, str) else class_weights
        self.class_weights = None if given is None else [float(weight) for weight in given]
        self.ignore_index = ignore_index
        self._ignored = _NO_LABEL if ignore_index is None else ignore_index
        self._weights: Tensor | None = None  # class_weights where the logits are
        self._num_outputs: int | None = None  # of the model, known once `check` ran

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The sum of the cross-entropies, and of what they count.

        Raises:
            DataError: On CPU, naming the sample whose label is outside the classes. Elsewhere looking would
                wait for the device: the loss of that microbatch becomes NaN.
            ModelError: Where the outputs are not logits for each label.
        """
        inputs, labels, *mixed = batch.data
        logits = outputs(model(inputs))
        if logits.ndim != 2 or logits.shape[:1] != labels.shape:
            raise mismatch(logits, labels)
        valid = at_least_fp32(valid_part(logits, batch)), valid_part(labels, batch).long()
        try:
            if mixed:
                total, count = self._mixed_sums(*valid, *(valid_part(part, batch) for part in mixed))
            elif logits.device.type == "cpu":
                total, count = self._sums(*valid)
            else:
                total, count = self._guarded_sums(*valid)
        except IndexError:
            check_labels(valid[1], logits.shape[1], self._ignored, batch.indices)
            raise
        return LossSum(total, count, preds=logits, target=labels)

    def _mixed_sums(
        self, logits: Tensor, labels: Tensor, partners: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The sums over samples that count as their labels by their shares, and as their partners' by the rest."""
        num_classes = logits.shape[1]
        total, count = logits.new_zeros(()), logits.new_zeros(())
        for targets, weights in ((labels, shares.to(logits.dtype)), (partners.long(), 1 - shares.to(logits.dtype))):
            known = is_known(targets, num_classes, self._ignored)
            if logits.device.type == "cpu" and not known.all():
                raise IndexError
            losses, counts = self._by_sample(logits, targets.where(known, 0))
            if logits.device.type != "cpu":
                losses = torch.where(known.all(), losses, math.nan)
            total = total + (losses * weights).sum()
            count = count + (counts * weights).sum()
        return total, count

    def _by_sample(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each sample, and what it counts."""
        weights = self._weights_like(logits)
        smoothing = self.label_smoothing
        losses = F.cross_entropy(
            logits, labels, weight=weights, ignore_index=self._ignored, reduction="none", label_smoothing=smoothing
        )
        counted = (labels != self._ignored).to(logits.dtype)
        return losses, counted if weights is None else weights[labels.where(labels != self._ignored, 0)] * counted

    def _sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        weights = self._weights_like(logits)
        total = F.cross_entropy(
            logits,
            labels,
            weight=weights,
            ignore_index=self._ignored,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if weights is None and self.ignore_index is None:
            return total, float(len(labels))
        counted = labels != self._ignored
        if weights is None:
            return total, counted.sum()
        return total, (weights[labels.where(counted, 0)] * counted).sum()

    def _guarded_sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        """The sums without waiting for the device; the total is NaN where a label is outside the classes.

        CUDA's own answer to such a label ends every later call of the process, and names no reason.
        """
        known = is_known(labels, logits.shape[1], self._ignored)
        total, count = self._sums(logits, labels.where(known, 0))
        return torch.where(known.all(), total, math.nan), count

    def _weights_like(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        kept = self._weights
        if kept is None or (kept.device, kept.dtype) != (logits.device, logits.dtype):
            self._weights = torch.tensor(self.class_weights, device=logits.device, dtype=logits.dtype)
        return self._weights

    @property
    def wants_labels(self) -> bool:
        """Whether the labels of the samples to train on are to be shown before the first loss."""
        return self._is_balanced

    def see_labels(self, labels: NDArray[np.int64], class_names: Sequence[str] | None) -> None:
        """Balance the classes by the labels of the samples to train on.

        Args:
            labels: One for each sample.
            class_names: Of the classes, where the data name them.

        Raises:
            DataError: Where a class has no sample.
        """
        size = self.num_classes or (len(class_names) if class_names else int(labels.max()) + 1)
        counts = np.bincount(labels[(labels != self._ignored) & (labels >= 0)], minlength=size)
        for number in np.flatnonzero(counts == 0).tolist():
            raise DataError(
                f"class {class_names[number] if class_names else number} has no samples to train on, and cannot be "
                "balanced",
                where="task.args.class_weights",
                remedy="hold out a smaller share (data.eval), or give the weights themselves, one for each class",
            )
        self.class_weights = (counts.sum() / (len(counts) * counts)).tolist()

    def metrics(self) -> Metrics:
        """A fresh accumulator for one evaluation."""
        from bigtrain.tasks.scores import ClassificationMetrics  # torchmetrics takes long to import: not before a step

        return ClassificationMetrics(self.num_classes, self._ignored)

    def examples(self, result: LossSum, batch: Batch, most: int) -> list[dict[str, Any]]:
        """Some of a microbatch's predictions, where the inputs are pictures; those that are wrong come first."""
        images, labels = batch.data
        if not isinstance(images, Tensor) or not len(images) or not is_picture(images[0]):
            return []
        logits = valid_part(at_least_fp32(cast(Tensor, result.preds)), batch)
        sure, predicted = logits.softmax(1).max(1)
        is_right = predicted == valid_part(labels, batch)
        wrong = (~is_right).nonzero().flatten().tolist()[: most // 3 + 1]
        right = is_right.nonzero().flatten().tolist()[: most - len(wrong)]
        return [
            {
                "image": data_uri(images[place].cpu()),
                "target": int(labels[place]),
                "prediction": int(predicted[place]),
                "confidence": round(float(sure[place]), 4),
            }
            for place in [*wrong, *right]
        ]

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
        self._num_outputs = logits.shape[1]
        self._check_classes(logits.shape[1])
        check_labels(valid_part(labels, batch), logits.shape[1], self._ignored, batch.indices)

    def check_data(self, dataset: Dataset) -> None:
        """Refuse data of more classes than the model has outputs, where the data say how many they have.

        Raises:
            DataError: Naming the classes that the model cannot say.
        """
        there, known = getattr(dataset, "num_classes", None), self._num_outputs
        if self.ignore_index is None and there and known and there > known:
            names = [str(name) for name in getattr(dataset, "class_names", None) or range(there)]
            raise DataError(
                f"the data have {there} classes and the model {known} output{'' if known == 1 else 's'}: "
                f"the head does not know "
                f"{', '.join(map(repr, names[known : known + 3]))}{' …' if there > known + 3 else ''}",
                where="model.args.num_classes",
                remedy=f"set model.args.num_classes={there}, or take data of fewer classes; theirs are:\n"
                f"{', '.join(map(repr, names[:_MOST_CLASSES]))}{' …' if there > _MOST_CLASSES else ''}",
            )

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


def _check_arguments(num_classes: object, label_smoothing: object, class_weights: object) -> None:
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        remedy = "give a whole number of at least 1"
        raise UserError(f"num_classes is {num_classes!r}", where="task.args.num_classes", remedy=remedy)
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        where = "task.args.label_smoothing"
        raise UserError(f"label_smoothing is {label_smoothing!r}", where=where, remedy="give a share, 0 to 1")
    if class_weights == "balanced":
        return
    if class_weights is not None and (isinstance(class_weights, str) or not isinstance(class_weights, Sequence)):
        where, remedy = "task.args.class_weights", "give `balanced`, or a list of numbers, one for each class"
        raise UserError(f"class_weights is {class_weights!r}", where=where, remedy=remedy)
    for weight in class_weights or ():
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            where, remedy = "task.args.class_weights", "give a list of numbers, 0 or more, one for each class"
            raise UserError(f"{weight!r} is among the class weights", where=where, remedy=remedy)
