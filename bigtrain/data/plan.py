"""Who reads which samples in which step: integers only, no data.

A step takes the next samples of the global order, at most the global batch size and never past the end of an
epoch. Rank r takes a contiguous, nearly equal slice of them and cuts it into microbatches. All ranks make the
same number of microbatches, so no rank waits in a collective for one that does not come; a rank that is short
repeats a sample, which then has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import NamedTuple

import numpy as np

from bigtrain.data.order import Integers, Order
from bigtrain.errors import DataError

# How many indices and steps a rank computes at once, over the ends of epochs: numpy's fixed cost is then
# spread over many steps, and the first step waits no more than some milliseconds for it.
_INDICES, _STEPS = 16384, 256


class Position(NamedTuple):
    """A place in the order of training: all there is to save.

    Attributes:
        epoch: Counted from 0.
        offset: How many samples of the epoch all ranks together have consumed.
    """

    epoch: int = 0
    offset: int = 0


START = Position()


class MicrobatchPlan(NamedTuple):
    """The samples of one microbatch on one rank.

    Attributes:
        indices: Of samples in the dataset; those that count first, never empty.
        num_valid: How many of them count.
        before: The sample before the first in the global batch, the last one for its first; -1 where nobody asked.
    """

    indices: list[int]
    num_valid: int
    before: int = -1


class StepPlan(NamedTuple):
    """What one rank reads in one step.

    Attributes:
        microbatches: As many on every rank.
        epoch: Counted from 0.
        step_in_epoch: Counted from 0.
        num_samples: How many samples count in this step, on all ranks together.
        end: Where the next step begins.
    """

    microbatches: list[MicrobatchPlan]
    epoch: int
    step_in_epoch: int
    num_samples: int
    end: Position


@dataclass(frozen=True, slots=True)
class Planner:
    """One rank's view of the order.

    Attributes:
        num_samples: Samples in the dataset.
        batch_size: Samples a step, on all ranks together.
        micro_batch_size: The most samples in a microbatch.
        rank: This rank.
        world_size: How many ranks there are.
        static_shapes: Whether every microbatch is filled up to `micro_batch_size`.
        order: From epoch and positions to indices of samples.
        is_mixed: Whether each microbatch is to know the sample before its first.
    """

    num_samples: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    static_shapes: bool
    order: Order
    is_mixed: bool = False

    def steps(self, start: Position) -> Iterator[StepPlan]:
        """The steps from `start` on, without end.

        Raises:
            DataError: If `start` lies outside the dataset.
        """
        if not (0 <= start.offset <= self.num_samples and start.epoch >= 0):
            raise DataError(
                f"epoch {start.epoch} cannot go on at sample {start.offset} of {self.num_samples}",
                remedy="go on with the dataset that the run was started with",
            )
        block = min(max(1, _INDICES * self.world_size // self.batch_size), _STEPS)
        return chain.from_iterable(self._plan(start, np.arange(first, first + block)) for first in count(0, block))

    def _plan(self, start: Position, steps: Integers) -> Iterator[StepPlan]:
        """Evaluate the order for many steps at once, counted from `start` on."""
        epochs, offsets = self._begins(start, steps)
        totals = np.minimum(self.batch_size, self.num_samples - offsets)
        firsts, sizes = slices_of(totals, self.rank, self.world_size)
        # Beyond a slice, its last sample again; a rank with an empty slice reads the last sample of the step.
        within = firsts[:, None] + np.minimum(np.arange(max(sizes.max(), 1)), sizes[:, None] - 1)
        if self.is_mixed:
            within = np.hstack((((firsts - 1) % totals)[:, None], within))
        rows = self.order(epochs[:, None], offsets[:, None] + within)
        end_epochs, end_offsets = self._begins(start, steps + 1)
        numbers = -(-offsets // self.batch_size)
        columns = (rows, sizes, epochs, numbers, totals, end_epochs, end_offsets)
        for row, size, epoch, number, total, *end in zip(*(column.tolist() for column in columns), strict=True):
            yield StepPlan(self._cut(row, size, total), epoch, number, total, Position(*end))

    def _begins(self, start: Position, steps: Integers) -> tuple[Integers, Integers]:
        """In which epoch each step is, counted from `start` on, and how many samples were consumed before it there."""
        steps_left = -(-(self.num_samples - start.offset) // self.batch_size)
        steps_per_epoch = -(-self.num_samples // self.batch_size)
        later = steps - steps_left  # counted from the next epoch on
        offsets = np.where(later < 0, start.offset + steps * self.batch_size, later % steps_per_epoch * self.batch_size)
        return start.epoch + 1 + later // steps_per_epoch, offsets

    def _cut(self, indices: list[int], num_valid: int, total: int) -> list[MicrobatchPlan]:
        """Cut this rank's slice of a step into as many microbatches as the longest slice needs."""
        width = self.micro_batch_size
        before = -1
        if self.is_mixed:
            before, *indices = indices
        if len(indices) == num_valid == width and total <= width * self.world_size:
            # By far the most common case, in a loop that counts microseconds.
            return [MicrobatchPlan(indices, num_valid, before)]
        plans = []
        for begin in range(0, -(-total // self.world_size), width):
            valid = indices[begin : min(begin + width, num_valid)]
            missing = (width if self.static_shapes else 1) - len(valid)
            plans.append(MicrobatchPlan(valid + indices[-1:] * missing, len(valid), before))
            before = valid[-1] if self.is_mixed and valid else before
        return plans


def slices_of(totals: Integers, rank: int, world_size: int) -> tuple[Integers, Integers]:
    """Where a rank's slice of each total begins and how long it is; the longer slices come first."""
    sizes, longer = np.divmod(totals, world_size)
    return rank * sizes + np.minimum(rank, longer), sizes + (rank < longer)
