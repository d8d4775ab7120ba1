"""An optimizer's own state (moments, step counters, hyperparameters) by parameter name, for any torch optimizer.

A slot is a tensor that the optimizer keeps for a parameter: of the parameter's shape (a moment, sharded like it) or
of shape () (a step counter, the same on every rank).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.errors import StateError
from bigtrain.optim import OptimizerPlan
from bigtrain.state import BUFFER, EMA, WEIGHT, Box, Piece, Reader, TensorSpec, whole

NOT_SLOTS = (WEIGHT, BUFFER, EMA)

# How a step is computed, not what it computes: these may differ between the engines of one run.
_IMPLEMENTATION = {
    *("params", "names", "base_lr", "lr", "fused", "foreach", "capturable", "differentiable"),
    "bias_correction",  # which DeepSpeed's Adam could leave out
}


def local(tensor: Tensor) -> Tensor:
    """The memory of a tensor on this rank."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group; `lr` is the rate before the schedule's factor."""
    return {"lr": group["base_lr"], **{k: v for k, v in group.items() if k not in _IMPLEMENTATION}}


def hyper(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Every hyperparameter by parameter name."""
    return {name: options(group) for group in optimizer.param_groups for name in group["names"]}


def set_hyper(optimizer: torch.optim.Optimizer, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Set every group's hyperparameters to what is wanted for its parameters.

    Raises:
        StateError: Where parameters of one group want different values.
    """
    for group in optimizer.param_groups:
        values = [dict(wanted[name]) for name in group["names"] if name in wanted]
        if any(value != values[0] for value in values):
            raise StateError(
                f"the state has different hyperparameters for parameters of one group, {group['names'][0]} among them",
                remedy="give the optimizer the groups it had when the state was saved (optim.groups)",
            )
        if values:
            group["base_lr"] = values[0].pop("lr")
            group.update(values[0])


def pieces(
    optimizer: torch.optim.Optimizer,
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    box: Box,
    is_owner: bool,
) -> list[Piece]:
    """The slots of one parameter, as this rank holds them."""
    result = []
    for kind, value in optimizer.state.get(tensor, {}).items():
        if not isinstance(value, Tensor):
            continue
        data = local(value)
        scalar = value.ndim == 0 and len(shape) > 0
        # A counter lies on every rank: the one that holds the tensor's first element stands for it.
        owner = is_owner and not any(box.offset) if scalar else is_owner
        where = ((), whole(())) if scalar else (shape, box)
        result.append(Piece(name, kind, where[0], data.dtype, where[1], data, owner))
    return result


def load(
    optimizer: torch.optim.Optimizer, tensor: Tensor, name: str, box: Box, reader: Reader, plan: OptimizerPlan
) -> None:
    """Read the slots of one parameter; one that has none in the reader starts anew."""
    optimizer.state.pop(tensor, None)
    for (kind, owner), spec in reader.index.items():
        if owner != name or kind in NOT_SLOTS:
            continue
        if kind == "step":
            # torch keeps the counter on the host, except for fused kernels, which read it on the device.
            slot = torch.zeros((), dtype=spec.dtype, device=local(tensor).device if plan.fusable else "cpu")
            reader.read_into(kind, name, whole(()), slot)
        else:
            slot = torch.zeros_like(tensor, dtype=plan.dtype_of_slot(tensor.dtype, spec.dtype), requires_grad=False)
            reader.read_into(kind, name, box, local(slot))
        optimizer.state[tensor][kind] = slot


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD the momentum buffers that it lacks: before the first step, or where a state brought none.

    The fused kernel leaves a new buffer uninitialised when the very first step is skipped. Zeros give the same first
    step, as long as nothing is dampened (`OptimizerPlan.fusable` sees to that).
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if "momentum_buffer" not in optimizer.state[parameter]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def check(reader: Reader, wanted: Mapping[tuple[str, str], TensorSpec], trained: Collection[str]) -> None:
    """Compare what a reader has with what is to be filled, before anything is.

    Args:
        reader: What there is.
        wanted: Every weight and buffer of the model, whole, by (kind, name).
        trained: The parameters that have hyperparameters.

    Raises:
        StateError: Listing everything that is missing, extra, misshapen or of another dtype.
    """
    problems = [f"missing: {kind} {name}" for kind, name in wanted if (kind, name) not in reader.index]
    for (kind, name), spec in reader.index.items():
        averaged = wanted.get((WEIGHT, name)) or wanted.get((BUFFER, name))
        ours = averaged if kind == EMA else wanted.get((kind, name))
        if ours is None:
            if kind in NOT_SLOTS or (WEIGHT, name) not in wanted:
                problems.append(f"extra: {kind} {name}")
        elif (tuple(spec.shape), spec.dtype) != ours:
            have = f"{tuple(spec.shape)} {spec.dtype}"
            problems.append(f"different: {kind} {name} is {have} in the state, {ours.shape} {ours.dtype} in the model")
    problems += [
        f"missing: hyperparameters of {name}" for name in sorted(set(trained) - set(reader.hyper)) if reader.hyper
    ]
    if problems:
        raise StateError("the state does not fit the model:\n  " + "\n  ".join(problems))
