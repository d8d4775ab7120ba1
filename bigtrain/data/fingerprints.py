"""Fingerprints: short strings that change when the data do, without reading all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.randomness import seed_generators, untouched_generators
from bigtrain.data.reading import cannot_read
from bigtrain.protocols import Dataset


class Digest:
    """XXH3-128 of texts and arrays."""

    def __init__(self, *parts: str | NDArray[Any]) -> None:
        self._state = xxhash.xxh3_128()
        for part in parts:
            self.add(part)

    def add(self, part: str | NDArray[Any]) -> None:
        """Add a text, or an array's type, shape and values."""
        if isinstance(part, str):
            self._state.update(part.encode())
        else:
            self._state.update(f"{part.dtype} {part.shape}".encode())
            self._state.update(np.ascontiguousarray(part).data)

    def __str__(self) -> str:
        return self._state.hexdigest()


def fingerprint(dataset: Dataset) -> str:
    """A dataset's own fingerprint, or the hash of its samples."""
    own = getattr(dataset, "fingerprint", None)
    return hash_samples(dataset) if own is None else str(own())


def hash_samples(dataset: Dataset) -> str:
    """A hash of the length and of the first, middle and last samples, with their random choices fixed."""
    length = len(dataset)
    digest = Digest(str(length))
    with untouched_generators():
        for index in sorted({0, length // 2, length - 1}):
            seed_generators(0, 0, index)
            try:
                sample = dataset[index]
            except Exception as error:
                raise cannot_read([index], error) from error
            _add(digest, sample)
    return str(digest)


def _add(digest: Digest, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    elif isinstance(value, Tensor):
        digest.add(f"{value.dtype} {tuple(value.shape)}")
        digest.add(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif hasattr(value, "__array_interface__"):  # arrays of numpy, images of Pillow
        digest.add(np.asarray(value))
    elif isinstance(value, (str, int, float, bool, bytes)) or value is None:
        digest.add(f"{type(value).__name__} {value!r}")
    else:
        digest.add(type(value).__qualname__)  # its repr may hold a memory address
