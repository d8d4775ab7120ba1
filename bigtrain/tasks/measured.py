"""What an evaluation measures, when it is a user's own: that it can be asked, and that ranks agree on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.dist import World
from bigtrain.errors import UserError
from bigtrain.protocols import Batch, LossSum, Task
from bigtrain.tasks.tensors import valid_part

# Ranks that have reduced the same states have the same numbers but for the order in which a library added them up.
_RELATIVE_DIFFERENCE = 1e-6


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the tensor itself being left as it is. Every rank must call it.

    For `compute()` of metrics of your own; in a single process it is the tensor.
    """
    total = values.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def metrics_of(task: Task) -> Any:
    """A fresh accumulator for one evaluation; one of torchmetrics is shown the loss's `preds` and `target`."""
    metrics = task.metrics()
    return _Shown(metrics) if type(metrics).__module__.startswith("torchmetrics.") else metrics


class _Shown:
    """A metric of torchmetrics, or a collection of them, which sum over ranks by themselves."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        metric.reset()  # a task may hold one, and give it again and again
        self._saw_none = torch.ones(1)

    def to(self, device: torch.device) -> None:
        self._metric.to(device)
        self._saw_none = self._saw_none.to(device)

    def update(self, result: LossSum, batch: Batch) -> None:
        if result.preds is None or result.target is None:
            raise UserError(
                f"{type(self._metric).__name__} compares predictions with targets, and the task's loss returned none",
                where="task",
                remedy="return LossSum(total, count, preds=…, target=…)",
            )
        if batch.num_valid:  # some of them cannot take none
            self._saw_none.zero_()
            self._metric.update(valid_part(result.preds, batch), valid_part(result.target, batch))

    def compute(self) -> dict[str, Any]:
        if sum_over_ranks(self._saw_none).item():
            raise UserError(
                "there are fewer samples to evaluate on than processes, and torchmetrics' "
                f"{type(self._metric).__name__} wants some in each",
                where="data.eval",
                remedy="evaluate on more, or measure by an accumulator of your own (docs/extending.md)",
            )
        measured = self._metric.compute()
        if isinstance(measured, Mapping):
            return dict(measured)
        return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self._metric).__name__).lower(): measured}


def check_metrics(task: Task) -> None:
    """Refuse metrics of a user's own that cannot be used, before the first step.

    Those of bigtrain are not made here: what they import takes seconds.

    Raises:
        UserError: Where `metrics()` gives something without `update` and `compute`.
    """
    if getattr(type(task).metrics, "__module__", "").startswith("bigtrain."):
        return
    metrics = metrics_of(task)
    lacking = [method for method in ("update", "compute") if not callable(getattr(metrics, method, None))]
    if lacking:
        raise UserError(
            f"metrics() of the task {type(task).__name__} gives a {type(metrics).__name__}, which has no "
            f"{' and no '.join(lacking)}",
            where="task.name",
            remedy="return a new accumulator, with update(result, batch), and compute() -> numbers by name\n"
            "(docs/extending.md has an example), or leave evaluation out: data.eval=none",
        )


def checked(numbers: Any) -> dict[str, Any]:
    """What `compute()` gave, if it is numbers by name; tensors of one number and numpy's numbers as Python's.

    Raises:
        UserError: Where it is not.
    """
    if isinstance(numbers, Mapping):
        return {name: _as_number(value) for name, value in numbers.items()}
    raise UserError(
        f"compute() of the task's metrics gives a {type(numbers).__name__}",
        where="task.name",
        remedy="return numbers by name, as {'accuracy': 0.9}",
    )


def _as_number(value: Any) -> Any:
    """A single number as Python's own, whatever library it is of; several of numpy's as a tensor."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.as_tensor(value)
    return value.item() if isinstance(value, Tensor) and value.ndim <= 1 and value.numel() == 1 else value


class Doubts:
    """What is wrong with measured numbers, each thing said once.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._told: set[str] = set()

    def about(self, numbers: Mapping[str, Any]) -> list[str]:
        """What has not been said yet. Every rank must call it."""
        found = self._of_ranks(numbers)
        if not math.isfinite(numbers["loss"]):
            found["loss"] = "the loss of the evaluation is not finite"
        texts = [text for name, text in found.items() if name not in self._told]
        self._told |= found.keys()
        return texts

    def _of_ranks(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        """The metrics that ranks do not agree on, what stands for the run being rank 0's."""
        if self._world.size == 1:
            return {}
        first, *others = self._world.all_gather_object(_plain(numbers))
        names = dict.fromkeys(name for each in (first, *others) for name in each)
        return {
            name: f"the metric {name} is {_said(first, name)} on rank 0 and {_said(other, name)} on rank {rank}: each "
            "measured its own part of the data. Sum over ranks in compute(): bigtrain.sum_over_ranks(tensor)"
            for name in names
            for rank, other in reversed([*enumerate(others, 1)])
            if not _is_same(first.get(name), other.get(name))
        }


def _plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers."""
    single = {
        str(name): value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in numbers.items()
    }
    return {name: float(value) for name, value in single.items() if isinstance(value, (int, float))}


def _is_same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_RELATIVE_DIFFERENCE) or (math.isnan(one) and math.isnan(other))


def _said(numbers: Mapping[str, float], name: str) -> str:
    return f"{numbers[name]:.6g}" if name in numbers else "not there"
