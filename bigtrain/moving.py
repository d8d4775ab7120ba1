"""Batches onto the device that computes, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigtrain.protocols import Batch


def moved(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on the device, its floating tensors in the dtype of the run; the batch itself where it is so already."""
    data, weight = _moved(batch.data, device, dtype), _moved(batch.weight, device, None)
    return batch if data is batch.data and weight is batch.weight else replace(batch, data=data, weight=weight)


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        wanted = dtype if dtype and value.is_floating_point() else value.dtype
        if value.dtype == wanted and value.device == device:
            return value  # `to` would find out by itself, at ten times the cost
        if device.type == "cuda" and value.device.type == "cpu":
            # From other memory than pinned the copy to the device would make this process wait.
            value = torch.empty_like(value, dtype=wanted, pin_memory=True).copy_(value)
        return value.to(device, wanted, non_blocking=True)
    if isinstance(value, Mapping):
        parts = [_moved(item, device, dtype) for item in value.values()]
        is_same = all(part is item for part, item in zip(parts, value.values(), strict=True))
        return value if is_same else dict(zip(value, parts, strict=True))
    if isinstance(value, (tuple, list)):
        parts = [_moved(item, device, dtype) for item in value]
        if all(part is item for part, item in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
