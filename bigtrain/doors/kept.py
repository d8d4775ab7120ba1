"""What a checkpoint keeps besides tensors (position, run file, fingerprint), as it goes through other formats: JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint import json_exact

KEY = "bigtrain"


def as_text(value: Mapping[str, Any]) -> str:
    """As text that `from_text` reads to the last bit."""
    return json_exact.dumps(value, what="kept")


def from_text(text: str) -> dict[str, Any]:
    """What `as_text` was given; nothing where it is not what that writes."""
    try:
        value = json_exact.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def as_tensor(value: Mapping[str, Any]) -> Tensor:
    """The text as bytes in a tensor (uint8), for formats that would pickle everything else."""
    return torch.frombuffer(bytearray(as_text(value).encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> dict[str, Any]:
    """What `as_tensor` was given."""
    return from_text(bytes(tensor.numpy().data).decode("utf-8", errors="replace"))
