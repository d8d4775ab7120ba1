"""Which labels are classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bigtrain.errors import DataError
from bigtrain.tasks.inspection import sample


def is_known(labels: Tensor, num_classes: int, ignored: int) -> Tensor:
    """Whether each label is one of the classes, or the one that is ignored."""
    labels = labels.long()  # torch compares no unsigned ones of more than 8 bits
    return ((labels >= 0) & (labels < num_classes)) | (labels == ignored)


def check_labels(labels: Tensor, num_classes: int, ignored: int, indices: Sequence[int]) -> None:
    """Refuse labels that are no classes.

    Args:
        labels: Of the samples that count, shape (n,).
        num_classes: How many classes there are.
        ignored: A label that may stand there without being one.
        indices: The samples' numbers.

    Raises:
        DataError: Naming the first sample whose label is outside the classes.
    """
    known = is_known(labels, num_classes, ignored)
    for position in (~known).nonzero().flatten().tolist():
        raise DataError(
            f"label {labels[position]} of {sample(indices, position)} is none of the {num_classes} classes "
            f"0 to {num_classes - 1}",
            where="data",
            remedy="correct the labels, give the model more outputs (model.args.num_classes),\n"
            "or leave samples with that label out by task.args.ignore_index",
        )
