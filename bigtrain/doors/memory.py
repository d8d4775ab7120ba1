"""Memory for one tensor at a time."""

from __future__ import annotations

import math
import mmap
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bigtrain.state import TensorSpec

# Of the tensors that are alive, by where they lie.
_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def tensor_for(spec: TensorSpec) -> Tensor:
    """A tensor of this shape and dtype in a mapping of its own, which goes back to the system with it.

    From the heap, tensors of tens of megabytes that come and go leave holes that the next one does not fit into:
    sixteen of 26 MB were seen to take 420 MB.
    """
    count = math.prod(spec.shape)
    if not count:
        return torch.empty(spec.shape, dtype=spec.dtype)
    own = mmap.mmap(-1, count * spec.dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(own, dtype=spec.dtype).view(spec.shape)
    _mappings[tensor.data_ptr()] = own
    return tensor


def give_back(tensor: Tensor) -> None:
    """Give the memory of such a tensor back though somebody still holds it; nobody may read it any more."""
    own = _mappings.get(tensor.data_ptr())
    if own is not None:
        own.madvise(mmap.MADV_DONTNEED)
