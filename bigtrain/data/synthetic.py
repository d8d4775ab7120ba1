"""Made-up samples of any shape: for measuring, and for trying a model out without data.

Every sample is a pure function of its index, and cheap: noise is a window into one pool of random numbers.
All three kinds can be learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.catalogue import SYNTHETIC_KINDS
from bigtrain.data.order import mix, mix_array
from bigtrain.errors import DataError
from bigtrain.named import call, load, suggest

_POOL = 1 << 20  # from how many places of the pool a window may begin
_TO_PLACE = np.uint64(64 - 20)  # leaves a place: the upper bits, as the lower ones choose labels
_STREAM = 0x5E17_4E71


class Synthetic:
    """Samples that are computed from their index, a batch at once.

    Args:
        samples: How many.
        make: From words, uint64 (samples,), each the hash of an index, to a batch.
        description: For the fingerprint.
        seed: Hashed with the index.
    """

    is_random = False

    def __init__(
        self,
        samples: int,
        make: Callable[[NDArray[np.uint64]], Any],
        description: str,
        seed: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._samples = samples
        self._make = make
        self._description = description
        self._stream = mix(_STREAM, seed)
        self.num_classes = num_classes
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        if isinstance(batch, Mapping):
            return {name: values[0] for name, values in batch.items()}
        return tuple(values[0] for values in batch)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The whole batch at once."""
        return self._make(mix_array(self._stream, np.array(indices, dtype=np.uint64)))

    def fingerprint(self) -> str:
        """Its arguments: they make the samples."""
        return self._description


def synthetic(split: str, *, kind: str, **args: Any) -> Synthetic:
    """Made-up samples.

    Args:
        split: `train` and `eval` have different samples of the same kind.
        kind: `classification`, `regression` or `causal_lm`.
        args: Those of the kind, see below.

    Raises:
        DataError: If there is no such kind, or an argument does not fit.
    """
    if kind not in SYNTHETIC_KINDS:
        raise DataError(
            f"synthetic has no kind {kind!r}",
            where="data.args.kind",
            remedy=suggest(str(kind), SYNTHETIC_KINDS, "kinds"),
        )
    counts = [v for value in args.values() for v in (value if isinstance(value, (list, tuple)) else [value])]
    if wrong := [value for value in counts if not (isinstance(value, int) and value > 0)]:
        raise DataError(
            f"synthetic takes positive whole numbers, not {wrong[0]!r}",
            where="data.args",
            remedy="correct that argument: samples, shape and the like are counts",
        )
    factory = load(SYNTHETIC_KINDS[kind], error=DataError, where="data.args.kind")
    made = call(factory, args, name=f"synthetic {kind}", error=DataError, where="data.args")
    samples, make, facts = made
    return Synthetic(samples, make, f"synthetic-{kind}-{split}-{sorted(args.items())}", mix(split == "eval"), **facts)


_Made = tuple[int, Callable[[NDArray[np.uint64]], Any], dict[str, int]]


def _classification(samples: int = 1024, shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> _Made:
    """Noise on a pattern for each class; (float32 (samples, *shape), int64 (samples,))."""
    noise, patterns = _windows(shape, seed=0), _windows(shape, seed=1)

    def make(words: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        labels = words % np.uint64(classes)
        images = noise(words) + patterns(mix_array(0, labels))
        return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

    return samples, make, {"num_classes": classes}


def _regression(samples: int = 1024, shape: Sequence[int] = (16,), targets: int = 1) -> _Made:
    """Linear in the inputs, of variance 1; (float32 (samples, *shape), float32 (samples, targets))."""
    inputs = _windows(shape, seed=0)
    size = prod(shape)
    weights = np.random.RandomState(1).standard_normal((targets, size)).astype(np.float32) / np.float32(size**0.5)

    def make(words: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        values = inputs(words)
        # Not `@`: its sums are ordered by the size of the batch, and a sample must not depend on that.
        sums = (values.reshape(len(words), 1, size) * weights).sum(axis=-1)
        return torch.from_numpy(values), torch.from_numpy(sums)

    return samples, make, {}


def _causal_lm(samples: int = 1024, context: int = 128, vocab: int = 257) -> _Made:
    """Counting by a stride, modulo the vocabulary: {"tokens": int64 (samples, context + 1)}."""
    steps = np.arange(context + 1, dtype=np.uint64)

    def make(words: NDArray[np.uint64]) -> dict[str, Tensor]:
        begins, strides = words % np.uint64(vocab), 1 + (words >> np.uint64(32)) % np.uint64(8)
        tokens = (begins[:, None] + strides[:, None] * steps) % np.uint64(vocab)
        return {"tokens": torch.from_numpy(tokens.astype(np.int64))}

    return samples, make, {"vocab_size": vocab}


def _windows(shape: Sequence[int], seed: int) -> Callable[[NDArray[np.uint64]], NDArray[np.float32]]:
    """From words to standard normal numbers of shape (words, *shape)."""
    size = prod(shape)
    # RandomState, since numpy promises that its numbers never change (NEP 19).
    pool = np.random.RandomState(seed).standard_normal(_POOL + size).astype(np.float32)
    rows = np.lib.stride_tricks.sliding_window_view(pool, size)

    def windows(words: NDArray[np.uint64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = rows[(words >> _TO_PLACE).astype(np.int64)].reshape(len(words), *shape)
        return found

    return windows
