"""A digest of a tensor that does not depend on how it is cut over ranks, and needs no copy of it.

The sum over all elements of (their bits as an integer) × (an odd number made of their position), modulo 2^64. One
element that changes changes the sum for certain; the digests of a tensor's parts add up to that of the whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigtrain.state import Box

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements: a few temporaries of eight bytes each
# The constants of splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014).
_GOLDEN, _MIX = -0x61C8864680B583EB, -0x40A7B892E31B1A47


@torch.no_grad()
def digest(data: Tensor, shape: tuple[int, ...], box: Box) -> int:
    """The digest of one part of a tensor, as a signed 64-bit integer; it is computed where the part lies.

    Args:
        data: The part.
        shape: The shape of the whole tensor.
        box: Which part it is.
    """
    if data.is_complex():
        return digest(torch.view_as_real(data), (*shape, 2), Box((*box.offset, 0), (*box.size, 2)))
    if not data.numel():
        return 0
    rows = data.contiguous().view(_INTEGERS[data.element_size()]).reshape(data.shape[0] if data.ndim else 1, -1)
    inner = _positions(shape[1:], Box(box.offset[1:], box.size[1:]), data.device)  # within a row of the whole tensor
    stride, first = math.prod(shape[1:]), box.offset[0] if box.offset else 0
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        row = torch.arange(first + start, first + start + part.shape[0], device=data.device)
        total += (_odd(row[:, None] * stride + inner) * part).sum()
    return int(total)


def _positions(shape: tuple[int, ...], box: Box, device: torch.device) -> Tensor:
    """The positions of a box's elements in a flattened tensor, themselves flat."""
    positions = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (offset, size) in enumerate(zip(box.offset, box.size, strict=True)):
        along = torch.arange(offset, offset + size, device=device) * math.prod(shape[axis + 1 :])
        positions = positions[..., None] + along
    return positions.reshape(-1)


def _odd(positions: Tensor) -> Tensor:
    mixed = positions * _GOLDEN
    mixed ^= mixed >> 31
    mixed *= _MIX
    mixed ^= mixed >> 29
    return mixed | 1
