"""What every loss does with tensors: take them from an answer, keep what counts, describe what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigtrain.errors import ModelError
from bigtrain.protocols import Batch


def outputs(answer: Any) -> Tensor:
    """The tensor a model returned, be it alone or the `logits` of a larger answer.

    Raises:
        ModelError: Where there is none, or there are auxiliary outputs that a loss would silently leave out.
    """
    if isinstance(answer, Tensor):
        return answer
    logits = getattr(answer, "logits", None)
    others = [field for field in getattr(answer, "_fields", ()) if field != "logits"]
    if isinstance(logits, Tensor) and all(getattr(answer, field) is None for field in others):
        return logits
    raise ModelError(
        f"the model returns {describe(answer)}, not one tensor",
        where="model",
        remedy="return the tensor alone (googlenet, inception_v3: model.args.aux_logits=false),\n"
        "or use a task of your own",
    )


def valid_part(values: Tensor, batch: Batch) -> Tensor:
    """Values of the samples that count; no new tensor where all do."""
    return values if batch.num_valid == len(values) else values[: batch.num_valid]


def at_least_fp32(values: Tensor) -> Tensor:
    """Losses are computed in float32, or in float64 where the model computes in it."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def mismatch(answer: Tensor, targets: Tensor) -> ModelError:
    """The error for outputs that cannot be compared with their targets."""
    return ModelError(
        f"the model returns {describe(answer)} for targets {describe(targets)}",
        where="model",
        remedy="give the model as many outputs as the task needs (model.args)",
    )


def describe(value: Any) -> str:
    """A value as its types and shapes."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        shown = ", ".join(describe(item) for item in value[:4])
        return f"({shown}{', …' if len(value) > 4 else ''})"
    return type(value).__name__
