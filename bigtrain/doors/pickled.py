"""Foreign pickles, which can run any code: read here and nowhere else, and only where the user allows it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from bigtrain.doors.dcp import key_of
from bigtrain.doors.kept import KEY, from_tensor
from bigtrain.doors.memory import tensor_for
from bigtrain.errors import CheckpointError, CorruptError
from bigtrain.state import BUFFER, Box, TensorSpec

Key = tuple[str, str]


def load(path: Path) -> Any:
    """What a file of torch.save holds, whatever that runs.

    Raises:
        CorruptError: Where it is no such file.
    """
    try:
        try:
            return torch.load(path, weights_only=False, mmap=True, map_location="cpu")
        except RuntimeError:
            return torch.load(path, weights_only=False, map_location="cpu")  # an old file, which cannot be mapped
    except Exception as error:
        raise CorruptError(f"{path} cannot be read: {error}", where=str(path)) from error


class _Remembering(FileSystemReader):
    """Reads the table of contents once, and not again for every tensor."""

    _found: Metadata | None = None

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The table of contents."""
        self._found = self._found or super().read_metadata(*args, **options)
        return self._found


class DcpReader:
    """A folder of torch.distributed.checkpoint.

    Args:
        path: The folder.

    Raises:
        CheckpointError: Where it is none.
    """

    form = "dcp"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / ".metadata").is_file():
            raise CheckpointError(f"{path} is no DCP folder: it holds no .metadata", where=str(path))
        try:
            self._files = _Remembering(path)
            metadata = self._files.read_metadata()
        except Exception as error:  # whatever unpickling says of a damaged file
            raise CorruptError(f"{path / '.metadata'} cannot be read: {error}", where=str(path)) from error
        tensors = {
            entry: TensorSpec(tuple(found.size), found.properties.dtype)
            for entry, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self._last: tuple[str, Tensor] | None = None
        self.kept: dict[str, Any] = {}
        if KEY in tensors:
            self.kept = from_tensor(self._read(KEY, tensors.pop(KEY)))
        buffers = set(self.kept.get("buffers", ()))
        self._entries: dict[Key, str] = {}
        for entry in tensors:
            kind, name = key_of(entry)
            self._entries[BUFFER if kind == "weight" and name in buffers else kind, name] = entry
        self.index: Mapping[Key, TensorSpec] = {key: tensors[entry] for key, entry in self._entries.items()}
        self.hyper: Mapping[str, Mapping[str, Any]] = self.kept.get("hyper", {})

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor; the whole of one is held at a time."""
        entry = self._entries.get((kind, name))
        if entry is None:
            raise CheckpointError(f"{self.path} has no {kind} {name}", where=str(self.path))
        if self._last is None or self._last[0] != entry:
            self._last = entry, self._read(entry, self.index[kind, name])
        with torch.no_grad():
            out.copy_(self._last[1][box.slices])

    def close(self) -> None:
        """Let go of the last tensor."""
        self._last = None

    def _read(self, entry: str, spec: TensorSpec) -> Tensor:
        state = {entry: tensor_for(spec)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            try:
                load_tensors(state, storage_reader=self._files, no_dist=True)
            except CheckpointException as error:  # around what went wrong, by rank
                cause = error.failures[0][0]
                if not isinstance(cause, Exception):  # a Ctrl-C
                    raise cause from None
                raise CorruptError(f"{self.path} cannot be read: {cause}", where=str(self.path)) from cause
        return state[entry]
