"""Who reads which samples in which step: integers only, no data.

A step takes the next samples of the global order, at most the global batch size and never past the end of an
epoch. Rank r takes a contiguous, nearly equal slice of them and cuts it into microbatches. All ranks make the
same number of microbatches, so no rank waits in a collective for one that does not come; a rank that is short
repeats a sample, which then has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple

import numpy as np

from bigtrain.data.order import Order
from bigtrain.errors import DataError

# How many indices and steps a rank computes at once, over the ends of epochs: numpy's fixed cost is then
# spread over many steps, and the first step waits no more than some milliseconds for it.
_BLOCK, _STEPS = 16384, 256


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
    """

    indices: list[int]
    num_valid: int


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
    """

    num_samples: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    static_shapes: bool
    order: Order

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
        return self._plan(self._spans(start))

    def first_epoch(self) -> Iterator[StepPlan]:
        """The steps of epoch 0, and no more."""
        return self._plan(takewhile(lambda span: span[0].epoch == 0, self._spans(START)))

    def _spans(self, start: Position) -> Iterator[tuple[Position, int]]:
        """Where each step begins and how many samples it has."""
        epoch, offset = start
        while True:
            while offset < self.num_samples:
                total = min(self.batch_size, self.num_samples - offset)
                yield Position(epoch, offset), total
                offset += total
            epoch, offset = epoch + 1, 0

    def _plan(self, spans: Iterator[tuple[Position, int]]) -> Iterator[StepPlan]:
        steps_per_block = min(max(1, _BLOCK * self.world_size // self.batch_size), _STEPS)
        while block := list(islice(spans, steps_per_block)):
            yield from self._plan_block(block)

    def _plan_block(self, spans: list[tuple[Position, int]]) -> Iterator[StepPlan]:
        """Evaluate the order for many steps at once."""
        slices = [slice_of(total, self.rank, self.world_size) for _, total in spans]
        epochs = np.array([[begin.epoch] for begin, _ in spans])
        offsets = np.array([[begin.offset] for begin, _ in spans])
        firsts, sizes = np.hsplit(np.array(slices), 2)
        # Beyond a slice, its last sample again; a rank with an empty slice reads the last sample of the step.
        positions = offsets + firsts + np.minimum(np.arange(max(sizes.max(), 1)), sizes - 1)
        rows = self.order(epochs, positions).tolist()
        for (begin, total), (_, size), indices in zip(spans, slices, rows, strict=True):
            epoch, offset = begin
            end = Position(epoch, offset + total)
            if end.offset == self.num_samples:
                end = Position(epoch + 1, 0)
            yield StepPlan(self._cut(indices, size, total), epoch, -(-offset // self.batch_size), total, end)

    def _cut(self, indices: list[int], num_valid: int, total: int) -> list[MicrobatchPlan]:
        """Cut this rank's slice of a step into as many microbatches as the longest slice needs."""
        width = self.micro_batch_size
        if len(indices) == num_valid == width and total <= width * self.world_size:
            # By far the most common case, in a loop that counts microseconds.
            return [MicrobatchPlan(indices, num_valid)]
        plans = []
        for begin in range(0, -(-total // self.world_size), width):
            valid = indices[begin : min(begin + width, num_valid)]
            missing = (width if self.static_shapes else 1) - len(valid)
            plans.append(MicrobatchPlan(valid + indices[-1:] * missing, len(valid)))
        return plans


def slice_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where a rank's slice of `total` samples begins and how long it is; the longer slices come first."""
    size, longer = divmod(total, world_size)
    return rank * size + min(rank, longer), size + (rank < longer)
