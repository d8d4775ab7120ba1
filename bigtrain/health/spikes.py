"""Losses that leap: told, and on request undone, as a large batch of bad data can spoil weights that are finite.

Losses on a GPU stay there, as nobody may wait for them, and are read at log intervals and before checkpoints, in one
transfer: a spike is told a little late, and none is ever saved. Of those on a CPU only what may be a spike is kept
until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.config import schema

WINDOW, _FEWEST = 50, 20  # steps that a loss is compared with; with fewer nothing is judged


class Spike(NamedTuple):
    """A loss that leapt.

    Attributes:
        step: The number of steps taken, the one that leapt included.
        loss: Its loss.
        usual: The mean loss of the steps before.
        end: Where the next step begins in the data: the epoch, and how many of its samples have been consumed.
    """

    step: int
    loss: float
    usual: float
    end: tuple[int, int]

    def __str__(self) -> str:
        return f"the loss is {self.loss:.4g}, {self.loss / self.usual:.1f} times that of the steps before"


def watch_spikes(health: schema.Health, recent: Iterable[float] = ()) -> SpikeWatch:
    """The watch that a run file asks for; `recent` are the losses before a run that goes on."""
    return SpikeWatch(health.spike_factor, rolls_back=health.on_spike == "roll_back", recent=recent)


class SpikeWatch:
    """Compares every loss with those of the steps before it.

    It is the same on every rank, as the loss is that of the global batch.

    Args:
        factor: How many times their mean a loss must be; it must be twice the largest of them besides, so that losses
            that vary much are no spikes. None: nothing is watched.
        rolls_back: Whether a spike ends what is judged, as all after it will be undone.
        recent: The losses of the last steps, where a run goes on.
    """

    def __init__(self, factor: float | None, *, rolls_back: bool = False, recent: Iterable[float] = ()) -> None:
        self._factor = factor
        self.rolls_back = rolls_back
        self._recent = deque(recent, WINDOW)
        self._unread: list[tuple[int, Tensor | float, tuple[int, int]]] = []

    @property
    def recent(self) -> list[float]:
        """The losses of the last steps that were read."""
        return list(self._recent)

    def observe(self, step: int, loss: Tensor | float, end: tuple[int, int]) -> None:
        """Take note of a step: how many were taken, its loss, and where the next one begins in the data."""
        if self._factor is None:
            return
        recent = self._recent
        # Most losses are told from spikes by the one before them: twice the largest is no less than twice that.
        if isinstance(loss, float) and not self._unread and recent and loss <= 2 * recent[-1] and isfinite(loss):
            recent.append(loss)
        else:
            self._unread.append((step, loss, end))

    def look(self) -> Iterator[Spike]:
        """Read what was noted, and tell of every spike in it."""
        unread, self._unread = self._unread, []
        for (step, _, end), loss in zip(unread, _values([loss for _, loss, _ in unread]), strict=True):
            spike = self._judged(step, loss, end) if isfinite(loss) else None
            if spike is not None:
                yield spike
                if self.rolls_back:
                    return

    def _judged(self, step: int, loss: float, end: tuple[int, int]) -> Spike | None:
        recent, factor = self._recent, self._factor
        spike = None
        if factor is not None and len(recent) >= _FEWEST and loss > 2 * recent[-1]:
            usual = sum(recent) / len(recent)
            if loss > factor * usual > 0 and loss > 2 * max(recent):
                spike = Spike(step, loss, usual, end)
        recent.append(loss)  # a level that stays is told once
        return spike


def _values(losses: list[Tensor | float]) -> list[float]:
    """Losses as plain numbers, those on a device in one transfer."""
    if losses and all(isinstance(loss, Tensor) for loss in losses):
        read: list[float] = torch.stack([loss for loss in losses if isinstance(loss, Tensor)]).tolist()
        return read
    return [float(loss) for loss in losses]
