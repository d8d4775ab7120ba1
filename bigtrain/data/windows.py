"""Windows into a long row of token ids: the samples of language modelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.errors import DataError


class Windows:
    """Sample i is `context` + 1 ids from position i · context on: as many inputs, and each one's target.

    Neighbours share one id, so every id but the first is a target exactly once; a shorter rest at the end is
    left out. A batch is {"tokens": int64 (samples, context + 1)} and, where documents are told apart,
    "documents" of the same shape: the number of each id's document, counted from 0 within its window.

    Args:
        tokens: All ids, unsigned; may be a memory map.
        context: How many ids a model sees at once.
        vocab_size: Every id is below it.
        documents: Where each document begins, as uint64; None if they are not told apart.
        fingerprint: Of all the above.

    Raises:
        DataError: If there are too few ids for one window.
    """

    is_random = False

    def __init__(
        self,
        tokens: NDArray[Any],
        *,
        context: int,
        vocab_size: int,
        documents: NDArray[np.uint64] | None,
        fingerprint: Callable[[], str],
    ) -> None:
        if not (isinstance(context, int) and context > 0):
            raise DataError(
                f"context: {context!r} is not a positive number of tokens",
                where="data.args.context",
                remedy="give what the model's context is",
            )
        if len(tokens) <= context:
            raise DataError(
                f"the text has {len(tokens)} tokens, and one sample of context {context} needs {context + 1}",
                where="data.args",
                remedy="give more text, or a smaller context",
            )
        self.context = context
        self.vocab_size = vocab_size
        self._length = (len(tokens) - 1) // context
        self._rows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[
            ::context
        ]  # overlaps, copies nothing
        self._documents = documents
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The whole batch by one gather."""
        which = np.fromiter(indices, np.int64, len(indices))
        batch = {"tokens": torch.from_numpy(self._rows[which].astype(np.int64))}
        if self._documents is not None:
            batch["documents"] = torch.from_numpy(self._document_numbers(which, self._documents))
        return batch

    def fingerprint(self) -> str:
        """Changes when the ids or their cutting do."""
        return f"{self._fingerprint()}-{self.context}-{self._documents is not None:d}"

    def _document_numbers(self, which: NDArray[np.int64], documents: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Count the beginnings of documents along each window; shape (samples, context + 1)."""
        # Unsigned like the documents: else numpy would convert all of those, which may be many and on the disk.
        begins = which.astype(np.uint64) * np.uint64(self.context)
        first = np.searchsorted(documents, begins, side="right")
        last = np.searchsorted(documents, begins + np.uint64(self.context), side="right")
        counts = last - first
        rows = np.repeat(np.arange(len(which)), counts)
        offsets_in_row = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = documents[first[rows] + offsets_in_row] - begins[rows]
        numbers = np.zeros((len(which), self.context + 1), dtype=np.int64)
        numbers[rows, columns.astype(np.int64)] = 1
        return np.cumsum(numbers, axis=1)
