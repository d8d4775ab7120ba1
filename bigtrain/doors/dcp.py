"""Folders of torch.distributed.checkpoint (DCP), written by its own writer, one tensor at a time.

Weights are `model.<name>`, moments `optimizer.state.<name>.<slot>`, as a nested state_dict of model and optimizer
is flattened by DCP. Everything else is JSON in a tensor of bytes, `bigtrain`: anything but a tensor would be a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from bigtrain.doors.kept import KEY, as_tensor
from bigtrain.doors.memory import give_back
from bigtrain.state import BUFFER, WEIGHT

Key = tuple[str, str]

_SLOTS = "optimizer.state."
_MODEL = "model."


def key_of(entry: str) -> Key:
    """What an entry of a DCP folder is here."""
    if entry.startswith(_SLOTS):
        name, _, slot = entry.removeprefix(_SLOTS).rpartition(".")
        return slot, name
    return WEIGHT, entry.removeprefix(_MODEL)


def entry_of(key: Key) -> str:
    """How a tensor of ours is called in a DCP folder."""
    return f"{_MODEL}{key[1]}" if key[0] in (WEIGHT, BUFFER) else f"{_SLOTS}{key[1]}.{key[0]}"


class _Streaming(DefaultSavePlanner):
    """Has tensors read when they are written, and not before."""

    def __init__(self, reader: Any, keys: Mapping[str, Key]) -> None:
        super().__init__(flatten_state_dict=False)
        self._reader, self._keys = reader, keys
        self._last: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The tensor of an item."""
        key = self._keys.get(write_item.index.fqn)
        if key is None:
            return super().resolve_data(write_item)
        if self._last is not None:  # it has been written; torch's writer holds on to every tensor until the end
            give_back(self._last)
        self._last = self._reader.whole(key)
        return self._last


def write(path: Path, reader: Any) -> None:
    """Write a folder that dcp.load reads.

    Args:
        path: The folder.
        reader: What has `index`, `hyper`, `extra`, `step`, and `whole(key)`, a tensor by kind and name.
    """
    keys = {entry_of(key): key for key in reader.index}
    state: dict[str, Tensor] = {
        entry: torch.empty(reader.index[key].shape, dtype=reader.index[key].dtype, device="meta")
        for entry, key in keys.items()
    }
    buffers = [name for kind, name in reader.index if kind == BUFFER]
    state[KEY] = as_tensor({"step": reader.step, "hyper": reader.hyper, "buffers": buffers, "extra": reader.extra})
    # Nothing is fetched ahead: a tensor has been written when the next one is asked for.
    writer = FileSystemWriter(path, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    failure: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        try:
            save(state, storage_writer=writer, planner=_Streaming(reader, keys), no_dist=True)
        except CheckpointException as error:  # around what went wrong, by rank
            failure = error.failures[0][0]
    if failure is not None:
        raise failure  # here, where its own context stays
