"""Samples that a frozen part of the model has been through already, read from files where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# numpy has no bfloat16: bits are read as integers of their size.
INTEGERS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Column:
    """One part of every sample.

    Attributes:
        dtype: Of its elements.
        shards: Its rows in order, as integers of the elements' size; mapped files.
    """

    dtype: torch.dtype
    shards: Sequence[NDArray[Any]]


class Features:
    """Features, and what else belonged to the samples, by the samples' positions.

    Args:
        columns: The features, then the rest of a sample.
        class_names: Of the labels, where they are known.
    """

    is_random = False

    def __init__(self, columns: Sequence[Column], class_names: Sequence[str] | None = None) -> None:
        self._columns = columns
        self._ends = np.cumsum([len(shard) for shard in columns[0].shards])
        self.class_names = list(class_names) if class_names else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The whole batch at once."""
        wanted = np.fromiter(indices, np.int64, len(indices))
        where = np.searchsorted(self._ends, wanted, side="right")
        starts = np.concatenate(([0], self._ends[:-1]))
        return tuple(_gathered(column, where, wanted - starts[where]) for column in self._columns)


def _gathered(column: Column, where: NDArray[Any], rows: NDArray[Any]) -> Tensor:
    """Rows of several shards, in the order asked for."""
    shape = column.shards[0].shape[1:]
    found = np.empty((len(rows), *shape), column.shards[0].dtype)
    for number in np.unique(where):
        mine = where == number
        found[mine] = column.shards[number][rows[mine]]
    return torch.from_numpy(found).view(column.dtype)
