"""All of a run's evaluation data through a trained model: the numbers of the run's own evaluation, and by class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigtrain.data import EvalLoader
from bigtrain.dist import World
from bigtrain.errors import DataError
from bigtrain.evaluating.trained import Trained, check_model, refuse_given
from bigtrain.loop import evaluate as evaluate_batches
from bigtrain.moving import moved
from bigtrain.protocols import Batch, Dataset
from bigtrain.trainer import build_data, class_names_of, loaders, show_labels

_TRIED_SAMPLES = 2


@dataclass(frozen=True)
class ByClass:
    """How one class was met; a number whose divisor is 0 is None.

    Attributes:
        name: The class.
        precision: The share of right ones among those taken for it.
        recall: The share of those that were found.
        f1: The harmonic mean of both.
        support: How many samples had this label.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True)
class Measured:
    """An evaluation.

    Attributes:
        samples: How many samples were looked at.
        metrics: Every number of the task, as the run itself reports it.
        classes: By class, for a classification.
        is_same_data: Whether the data are those that the run was trained with.
    """

    samples: int
    metrics: dict[str, Any]
    classes: list[ByClass]
    is_same_data: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON: no tensors, and None for what is not a number."""
        return {
            "samples": self.samples,
            "is_same_data": self.is_same_data,
            "metrics": {name: _plain(value) for name, value in self.metrics.items()},
            "classes": [vars(each) for each in self.classes],
        }


def evaluate(trained: Trained) -> Measured:
    """Measure a model on its evaluation data.

    Batches are cut as the run cut them for its ranks, and each rank's are gone through in turn: the numbers are the
    run's own to the last bit where the arithmetic of the device is.

    Raises:
        DataError: Where there are no data to evaluate on, or they cannot be read.
    """
    config = trained.config
    refuse_given(config, "data")
    sets = build_data(config)
    if sets.eval is None:
        raise DataError(
            "the run has no data to evaluate on",
            where="data.eval",
            remedy="name some: --data 'eval={name: image_folder, args: {root: …}}', or hold out a share: "
            "--data 'eval={split: 0.1}'",
        )
    _check_classes(trained.kept.get("class_names"), class_names_of(sets))
    show_labels(trained.task, sets)
    check_model(trained, _first(sets.eval))
    size = trained.kept.get("world_size", 1)
    parts = [loaders(config, sets, World(rank=rank, size=size)) for rank in range(size)]
    evaluation = [part for _, part in parts if part is not None]
    numbers = evaluate_batches(trained, trained.task, _batches(evaluation, trained), trained.world)
    matrix = numbers.get("confusion_matrix")
    is_matrix = isinstance(matrix, Tensor) and matrix.ndim == 2
    classes = _by_class(matrix, class_names_of(sets)) if is_matrix else []  # type: ignore[arg-type]
    return Measured(evaluation[0].num_samples, numbers, classes, sets.fingerprint == trained.kept.get("fingerprint"))


def _check_classes(known: list[str] | None, names: list[str] | None) -> None:
    if known and names and known != names:
        raise DataError(
            f"the model knows the classes {', '.join(map(repr, known))}, and the data have "
            f"{', '.join(map(repr, names))}",
            where="data",
            remedy="give data of the same classes, so that labels mean the same",
        )


def _first(samples: Dataset) -> Batch:
    return next(iter(EvalLoader(samples, batch_size=_TRIED_SAMPLES, max_samples=_TRIED_SAMPLES)))


def _batches(parts: list[EvalLoader], trained: Trained) -> Iterator[Batch]:
    for part in parts:
        try:
            for batch in part:
                yield moved(batch, trained.world.device, trained.dtype())
        finally:
            part.close()


def _by_class(matrix: Tensor, names: list[str] | None) -> list[ByClass]:
    """Precision, recall and F1 of each class, from counts by label (rows) and prediction (columns)."""
    right, support, taken = matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
    known = names if names and len(names) == len(right) else [str(number) for number in range(len(right))]
    return [
        ByClass(name, _share(hits, guesses), _share(hits, there), _share(2 * hits, guesses + there), there)
        for name, hits, there, guesses in zip(known, right, support, taken, strict=True)
    ]


def _share(part: int, of: int) -> float | None:
    return part / of if of else None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
