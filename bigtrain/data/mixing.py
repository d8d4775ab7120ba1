"""Mixup and CutMix: a sample is mixed with the one before it in the global batch, whichever rank that is on.

The partner is the previous sample of the global order, and the last one of the batch for its first, as in
torchvision's `MixUp` and `CutMix`, which roll the batch by one. So a rank reads one sample more than it trains on, and
what is mixed with what depends on no number of ranks or microbatches. How they are mixed is drawn for each sample from
(seed, epoch, index), as every random choice about a sample is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigtrain.data.order import mix
from bigtrain.errors import DataError

_STREAM = 0x317C_0B5E  # keeps these choices apart from those of augmentations


class Mixed(NamedTuple):
    """A batch whose samples are mixtures of two.

    Attributes:
        inputs: The mixtures.
        labels: Integers (B,), of the samples themselves.
        partners: Integers (B,), of what they were mixed with.
        shares: float32 (B,), how much of each is the sample itself; the rest is its partner.
    """

    inputs: Tensor
    labels: Tensor
    partners: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Mixing:
    """How samples are mixed.

    Attributes:
        mixup: The shares are drawn from Beta(mixup, mixup) (Zhang et al., arXiv:1710.09412); 0: no mixup.
        cutmix: The same for the area of the image that stays (Yun et al., arXiv:1905.04899); 0: no CutMix.
        share: Of the samples that are mixed at all.
        seed: Of the run.
    """

    mixup: float
    cutmix: float
    share: float
    seed: int

    def __call__(self, epoch: int, indices: Sequence[int], data: Any) -> Mixed:
        """Mix each sample with the one before it.

        Args:
            epoch: Counted from 0.
            indices: Of the samples, n of them.
            data: Inputs (n + 1, …) and labels (n + 1,), of which the first is the partner of the second alone.

        Raises:
            DataError: Where the data are not such pairs.
        """
        inputs, labels = self._checked(data)
        own, others = inputs[1:], inputs[:-1]
        choices = [self._choose(epoch, index, tuple(own.shape[2:])) for index in indices]
        blended = torch.tensor([1.0 if choice.box else choice.share for choice in choices]).to(own.dtype)
        blended = blended.view(-1, *[1] * (own.ndim - 1))
        mixed = own * blended + others * (1 - blended)
        for place, choice in enumerate(choices):
            if choice.box:
                mixed[place][choice.box] = others[place][choice.box]
        return Mixed(mixed, labels[1:], labels[:-1], torch.tensor([choice.share for choice in choices]))

    def _checked(self, data: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
            raise DataError("samples can be mixed where they are pairs (input, label)", where="data.mix")
        inputs, labels = data
        if not inputs.is_floating_point() or labels.ndim != 1 or labels.is_floating_point():
            raise DataError(
                f"inputs of {inputs.dtype} with labels of {labels.dtype} cannot be mixed",
                where="data.mix",
                remedy="mixing takes floating inputs, and an integer label for each",
            )
        if self.cutmix and inputs.ndim != 4:
            raise DataError(
                f"CutMix cuts images (channels, height, width), and the inputs are {tuple(inputs.shape[1:])}",
                where="data.mix.cutmix",
                remedy="take data.mix.mixup alone",
            )
        return inputs, labels

    def _choose(self, epoch: int, index: int, size: tuple[int, ...]) -> _Choice:
        # RandomState, since numpy promises that its numbers never change (NEP 19).
        draw = np.random.RandomState(mix(_STREAM, self.seed, epoch, index) & 0xFFFF_FFFF)
        is_mixed, is_cut = draw.random_sample() < self.share, draw.random_sample() < 0.5
        if not is_mixed:
            return _Choice(1.0)
        if not self.cutmix or (self.mixup and not is_cut):
            return _Choice(float(draw.beta(self.mixup, self.mixup)))
        return _cut(float(draw.beta(self.cutmix, self.cutmix)), draw, *size)


class _Choice(NamedTuple):
    """How a sample is mixed: how much of it stays, and, where a part is cut out, which."""

    share: float
    box: tuple[slice, slice, slice] | None = None


def _cut(share: float, draw: np.random.RandomState, height: int, width: int) -> _Choice:
    """A box around a point drawn evenly, clipped at the borders; the share is what it leaves (as in torchvision)."""
    side = 0.5 * math.sqrt(1 - share)
    x, y = draw.randint(width), draw.randint(height)
    left, right = max(x - int(side * width), 0), min(x + int(side * width), width)
    top, bottom = max(y - int(side * height), 0), min(y + int(side * height), height)
    left_over = 1 - (right - left) * (bottom - top) / (height * width)
    return _Choice(left_over, (slice(None), slice(top, bottom), slice(left, right)))
