"""A share of a dataset, held out for evaluation by a rule instead of a list.

Which samples are held out is a pure function of (length, share, split seed): it does not change with the seed
of the run, so runs that differ in it are measured on the same samples. A rule needs no memory, so it also
serves 10^12 samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bigtrain.data.order import Integers, mix, permute
from bigtrain.errors import DataError
from bigtrain.protocols import Dataset

_STREAM = 0x5EED_5711  # keeps the split apart from the order of training under the same seed


class Part:
    """Some of the samples of a dataset: those at positions start … stop - 1 of a fixed permutation.

    Attributes:
        base: The dataset it is a part of.
    """

    def __init__(self, base: Dataset, seed: int, start: int, stop: int) -> None:
        self.base = base
        self._key = np.array(mix(_STREAM, seed), dtype=np.uint64)
        self._start = start
        self._stop = stop

    @property
    def class_names(self) -> Any:
        """Those of the whole."""
        return getattr(self.base, "class_names", None)

    @property
    def num_classes(self) -> Any:
        """Those of the whole."""
        return getattr(self.base, "num_classes", None)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.base[int(self.locate(np.array([index]))[0])]

    def locate(self, positions: Integers) -> Integers:
        """The indices in `base` of positions in this part, any shape."""
        return permute(positions + self._start, len(self.base), self._key)


def split(train_base: Dataset, eval_base: Dataset, share: float, seed: int) -> tuple[Part, Part]:
    """Cut a dataset into a part to train on and a part to evaluate on, without overlap and without rest.

    Args:
        train_base: The samples as training sees them.
        eval_base: The same samples as evaluation sees them (with other transforms).
        share: How much is held out, between 0 and 1; rounded to whole samples, at least one on each side.
        seed: Chooses which samples.

    Raises:
        DataError: If the share is not between 0 and 1, or there are fewer than two samples.
    """
    total = len(train_base)
    if not 0 < share < 1:
        raise DataError(
            f"a share of {share:g} cannot be held out for evaluation",
            where="data.eval.split",
            remedy="give a number between 0 and 1, or data.eval: none",
        )
    if total < 2:
        raise DataError(
            "one sample cannot be both trained on and held out for evaluation",
            where="data.eval.split",
            remedy="set data.eval to none, or to a dataset of its own",
        )
    held_out = min(max(round(total * share), 1), total - 1)
    return Part(train_base, seed, held_out, total), Part(eval_base, seed, 0, held_out)
