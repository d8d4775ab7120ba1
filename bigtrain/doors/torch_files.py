"""Files of torch.save: tensors by name, read by memory map and written in place, one tensor at a time.

    {"model": {name: tensor}, "optimizer": {name: {slot: tensor}}, "hyper": {name: {…}}, "step": 10, "bigtrain": "…"}

is what we write; a plain dictionary of tensors, and those below `model`, `state_dict`, `model_state_dict` or `module`,
are read as well.
Loading is `weights_only` unless the user allows a pickle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bigtrain.doors.memory import tensor_for
from bigtrain.errors import CheckpointError, CorruptError
from bigtrain.state import BUFFER, WEIGHT, Box, Reader, TensorSpec, whole

Key = tuple[str, str]

_BELOW = ("model", "state_dict", "model_state_dict", "module")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # errors of torch have them
_FOUND = re.compile(r"Unsupported (?:global|class|operand).*?(?:GLOBAL )?([\w.]+\.\w+)")


class TorchReader:
    """A file of torch.save.

    Args:
        path: The file.
        allow_pickle: Read a file that holds more than tensors and plain values.

    Raises:
        CheckpointError: Where it holds more and that is not allowed, or no tensors by name.
        CorruptError: Where it is no such file.
    """

    form = "torch"

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        self.path = path
        content = _load(path, allow_pickle)
        inner = next((content[word] for word in _BELOW if isinstance(content.get(word), Mapping)), content)
        buffers = content.get("buffers", ())
        buffers = buffers if isinstance(buffers, list | tuple) else ()
        self._tensors: dict[Key, Tensor] = {
            (BUFFER if name in buffers else WEIGHT, name): tensor
            for name, tensor in inner.items()
            if isinstance(tensor, Tensor) and isinstance(name, str)
        }
        if not self._tensors:
            held = ", ".join(repr(key) for key in content if isinstance(content[key], Mapping))
            raise CheckpointError(
                f"{path} holds no tensors by name" + (f", but dictionaries below {held}" if held else ""),
                where=str(path),
                remedy="save a state_dict(), alone or below one of " + ", ".join(_BELOW),
            )
        slots = content.get("optimizer") if inner is not content else None
        for name, kept in slots.items() if isinstance(slots, Mapping) else ():
            if isinstance(kept, Mapping) and isinstance(name, str):
                self._tensors |= {(slot, name): t for slot, t in kept.items() if isinstance(t, Tensor)}
        self.index: Mapping[Key, TensorSpec] = {
            key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()
        }
        hyper = content.get("hyper")
        if not (isinstance(hyper, Mapping) and all(isinstance(values, Mapping) for values in hyper.values())):
            hyper = {}
        self.hyper: Mapping[str, Mapping[str, Any]] = hyper
        self.content = {key: value for key, value in content.items() if not isinstance(value, Tensor | Mapping)}

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor."""
        if (kind, name) not in self._tensors:
            raise CheckpointError(f"{self.path} has no {kind} {name}", where=str(self.path))
        with torch.no_grad():
            out.copy_(self._tensors[kind, name][box.slices])

    def close(self) -> None:
        """Let go of the file."""
        self._tensors.clear()


def _is_old(path: Path) -> bool:
    """Whether a file is of before torch 1.6, which cannot be mapped: a bare pickle, not a zip file of it.

    Anything else is left to torch to refuse, and nobody is told to allow what is no pickle.
    """
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def _load(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    if allow_pickle:
        from bigtrain.doors.pickled import load

        content: Any = load(path)
    else:
        try:
            is_old = _is_old(path)
            content = torch.load(path, weights_only=True, mmap=not is_old, map_location="cpu")
        except Exception as error:  # torch has many names for a file that is not what it should be
            said = _COLOURS.sub("", str(error)).strip().partition("\n")[0].rstrip()
            if "Unsupported" in str(error) or "weights_only" in str(error):
                found = _FOUND.search(str(error))
                raise CheckpointError(
                    f"{path} holds more than tensors and plain values: {found[1] if found else said}",
                    where=str(path),
                    remedy="save its state_dict() alone; or, if you trust it, bring it in and begin with that:"
                    f"\nbigtrain ckpt import {path} OUT --from torch --allow-pickle",
                ) from error
            raise CorruptError(
                f"{path} is no file of torch.save, or a damaged one: {said}",
                where=str(path),
                remedy=f"it has {path.stat().st_size:,} bytes: compare with where it comes from, and copy it again",
            ) from error
    if isinstance(content, torch.nn.Module):  # of a pickle that the user trusts
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds {type(content).__name__}, not tensors by name",
            where=str(path),
            remedy="save a state_dict()",
        )
    return content


def write(path: Path, content: Mapping[str, Any], places: Mapping[Key, tuple[str, ...]], reader: Reader) -> None:
    """Write a file that torch.load reads, one tensor at a time.

    torch lays the file out without data (`torch.serialization.skip_data`), and the data are put in place.

    Args:
        path: The file.
        content: What is not a tensor.
        places: Where each tensor of the reader stands in it.
        reader: Where the tensors come from.
    """
    laid_out: dict[str, Any] = dict(content)
    with FakeTensorMode():
        for key, place in places.items():
            spec = reader.index[key]
            _put(laid_out, place, torch.empty(spec.shape, dtype=spec.dtype))
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(laid_out, path)
    with FakeTensorMode():
        found = torch.load(path, weights_only=True)
    with open(path, "r+b") as file:
        for key, place in places.items():
            spec, at = reader.index[key], _get(found, place)
            out = tensor_for(spec)
            reader.read_into(*key, whole(spec.shape), out)
            if out.numel():
                offset = at.untyped_storage()._checkpoint_offset
                file.seek(offset)
                file.write(out.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _put(content: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for word in place[:-1]:
        content = content.setdefault(word, {})
    content[place[-1]] = value


def _get(content: Any, place: tuple[str, ...]) -> Any:
    for word in place:
        content = content[word]
    return content
