"""Making a model say the same thing twice: dropout off, and a check that nothing else is random."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bigtrain.data import TrainLoader
from bigtrain.errors import CombinationError
from bigtrain.moving import moved
from bigtrain.protocols import Batch, Dataset, Task

# Attributes by which modules keep a dropout rate that is applied in a function: torch's MultiheadAttention and
# recurrent layers, attention modules of other libraries, stochastic depth.
_RATE_ATTRIBUTES = ("dropout", "attention_dropout", "dropout_p", "drop_prob", "drop_path")

# By how much sums may differ because they are rounded otherwise.
_ROUNDING = 1e-4
_LOSS = "(loss)"  # no name of a buffer


def switch_off_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate of a model to 0.

    Returns:
        What was switched off, one line a kind.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, _DropoutNd) and module.p > 0:
            module.p = 0.0
            found[kind] = found.get(kind, 0) + 1
        if kind == "StochasticDepth" and getattr(module, "p", 0) > 0:
            module.p = 0.0  # type: ignore[assignment]
            found[kind] = found.get(kind, 0) + 1
        for attribute in _RATE_ATTRIBUTES:
            rate = getattr(module, attribute, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, attribute, 0.0)
                found[f"{kind}.{attribute}"] = found.get(f"{kind}.{attribute}", 0) + 1
    return [f"{kind} ({count} of them)" for kind, count in found.items()]


def refuse_randomness(model: nn.Module, task: Task, dataset: Dataset) -> None:
    """Refuse a model that says something else when it is asked again.

    Raises:
        CombinationError: With what can be done.
    """
    batch = next(TrainLoader(dataset, batch_size=2).steps()).microbatches[0]
    dtype = next(model.parameters()).dtype
    batch = moved(batch, torch.device("cpu"), dtype)
    losses = set()
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.add(float(task.loss(copy.deepcopy(model), batch).total))
    if len(losses) > 1 and all(loss == loss for loss in losses):
        raise CombinationError(
            "the model is random in training, in a way that is not a dropout rate that could be set to 0",
            where="model",
            remedy="compare with that randomness switched off, by an argument of the model (model.args)",
        )


def refuse_mixing_of_samples(model: nn.Module, task: Task, dataset: Dataset) -> None:
    """Refuse a model or a task for which a batch in two parts is not the same batch.

    Raises:
        CombinationError: Naming the buffer where it is one, with what can be done.
    """
    loaders = [TrainLoader(dataset, batch_size=4, micro_batch_size=most) for most in (4, 2)]
    whole, halves = (_after(model, task, next(loader.steps()).microbatches) for loader in loaders)
    if apart := [name for name, value in halves.items() if _differ(value, whole[name])]:
        cause = "the loss of a sample depends" if apart[0] == _LOSS else f"the buffer {apart[0]} depends"
        raise CombinationError(
            f"{cause} on which samples are in its batch, so splitting the batch changes the numbers",
            where="model",
            remedy="leave out what mixes samples (batch means, running statistics), by an argument of the model\n"
            "(model.args) or of the task (task.args)",
        )


def _differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) > _ROUNDING * float(other.norm())


def _after(model: nn.Module, task: Task, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The sum of the losses, and the floating buffers of a copy of the model that has seen these batches."""
    torch.manual_seed(1)
    copied = copy.deepcopy(model)
    total, dtype = torch.zeros((), dtype=torch.float64), next(model.parameters()).dtype
    with torch.no_grad():
        for batch in batches:
            total += task.loss(copied, moved(batch, torch.device("cpu"), dtype)).total
    buffers = {name: buffer for name, buffer in copied.named_buffers() if buffer.is_floating_point()}
    return {_LOSS: total, **buffers}
