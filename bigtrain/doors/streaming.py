"""A checkpoint of ours read tensor by tensor, and written so: never more than one of them in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bigtrain.checkpoint.shards import DTYPES
from bigtrain.doors.memory import tensor_for
from bigtrain.state import BUFFER, EMA, WEIGHT, Box, TensorSpec, whole

Key = tuple[str, str]
Progress = Callable[[int], None]


class Checkpoint(Protocol):
    """A `bigtrain.state.Reader` of a checkpoint, or of what is made of one."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def step(self) -> int:
        """How many steps had been taken."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """What else belongs to it."""

    @property
    def hyper(self) -> Mapping[str, Mapping[str, Any]]:
        """Every hyperparameter by parameter name."""

    @property
    def index(self) -> Mapping[Key, TensorSpec]:
        """What there is to read, by kind and name."""

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` (the box's size) with that part of the tensor."""


class Watched:
    """A reader that tells how far it has come, and may have averages in the place of weights."""

    def __init__(self, reader: Checkpoint, progress: Progress, *, averaged: bool) -> None:
        self._reader, self._progress = reader, progress
        self._averaged = {name for kind, name in reader.index if kind == EMA} if averaged else set()
        self.index = {key: spec for key, spec in reader.index.items() if not (averaged and key[0] == EMA)}
        self.path, self.hyper, self.step = reader.path, reader.hyper, reader.step
        # What is written is whole, whatever the checkpoint leaves in another file.
        self.extra = {name: value for name, value in reader.extra.items() if name != "base"}

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor."""
        source = EMA if kind in (WEIGHT, BUFFER) and name in self._averaged else kind
        self._reader.read_into(source, name, box, out)
        self._progress(out.nbytes)

    def whole(self, key: Key) -> Tensor:
        """One tensor, whole."""
        spec = self.index[key]
        out = tensor_for(spec)
        self.read_into(*key, whole(spec.shape), out)
        return out


def weights_in(reader: Watched) -> list[Key]:
    """The weights and buffers among what there is."""
    return [key for key in reader.index if key[0] in (WEIGHT, BUFFER)]


def bytes_of(reader: Watched, key: Key) -> int:
    """The size of one tensor."""
    shape, dtype = reader.index[key]
    return dtype.itemsize * torch.Size(shape).numel()


def write_safetensors(
    reader: Watched, path: Path, keys: list[Key] | None = None, rename: Callable[[str], str] = str
) -> None:
    """A file of the format (its documentation): header, then tensors in the order of the header, aligned by size.

    Args:
        reader: Where the tensors come from.
        path: The file to make.
        keys: Which tensors; None: all weights and buffers.
        rename: What each is to be called.
    """
    held = sorted(weights_in(reader) if keys is None else keys, key=lambda key: -reader.index[key].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key in held:
        shape, dtype = reader.index[key]
        end = place + bytes_of(reader, key)
        header[rename(key[1])] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for key in held:
            file.write(reader.whole(key).reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
