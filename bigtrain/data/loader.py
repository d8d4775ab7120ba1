"""Batches for one rank: plans turned into data, weights and sample numbers.

The rule who reads what is in `plan`, the reading in `reading`; here they meet. A loader knows neither engine
nor device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.data.mixing import Mixing
from bigtrain.data.order import Integers, Order, sequential, shuffled
from bigtrain.data.plan import START, MicrobatchPlan, Planner, Position
from bigtrain.data.reading import Collate, Fetcher, InProcess, InWorkers, Reader
from bigtrain.data.split import Part
from bigtrain.errors import DataError
from bigtrain.protocols import Batch, Dataset


class StepBatch(NamedTuple):
    """What one rank trains on in one optimizer step.

    Attributes:
        microbatches: As many on every rank, at least one.
        epoch: Counted from 0.
        step_in_epoch: Counted from 0.
        num_samples: How many samples count in this step, on all ranks together.
        end: Where the next step begins; at the end of an epoch that is offset 0 of the next.
    """

    microbatches: list[Batch]
    epoch: int
    step_in_epoch: int
    num_samples: int
    end: Position

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last step of its epoch."""
        return self.end.epoch > self.epoch


class TrainLoader:
    """Training steps for one rank, shuffled anew each epoch, every sample exactly once an epoch.

    Args:
        dataset: Samples by number.
        batch_size: Samples a step, on all ranks together; the last step of an epoch may have fewer.
        micro_batch_size: The most samples in a microbatch of one rank; None takes a rank's whole share of the
            step.
        rank: This rank.
        world_size: How many ranks there are.
        seed: Of the order and of the random choices about samples.
        workers: Processes that read ahead; 0 reads in this one. It changes nothing else.
        static_shapes: Fill every microbatch up to its full size with samples of weight 0.
        collate: Puts a list of samples together, instead of the dataset's own or torch's.
        mixing: Mixes each sample with the one before it in the global batch.

    Attributes:
        num_samples: Samples in an epoch.
        steps_per_epoch: Steps in an epoch.

    Raises:
        DataError: If the dataset is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        static_shapes: bool = False,
        collate: Collate | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.num_samples = _length(dataset)
        self.steps_per_epoch = -(-self.num_samples // batch_size)
        share = -(-batch_size // world_size)
        base, order = _resolve(dataset, shuffled(self.num_samples, seed))
        self._planner = Planner(
            self.num_samples,
            batch_size,
            min(micro_batch_size or share, share),
            rank,
            world_size,
            static_shapes,
            order,
            is_mixed=mixing is not None,
        )
        self._fetcher = _fetcher(Reader(base, seed, collate, mixing), workers)

    def steps(self, start: Position = START) -> Iterator[StepBatch]:
        """The steps from `start` on, without end.

        Raises:
            DataError: If `start` lies outside the dataset, or a sample cannot be read.
        """
        for plan, data in self._fetcher.run(self._planner.steps(start)):
            yield StepBatch(list(map(_batch, plan.microbatches, data)), *plan[1:])

    def smallest_microbatch(self, steps: int | None) -> int:
        """How many samples the smallest microbatch of this rank has, in so many steps; None: in an epoch."""
        last = self.steps_per_epoch - 1
        firsts = {0, last if steps is None or steps > last else 0}
        plans = [next(self._planner.steps(Position(0, first * self._planner.batch_size))) for first in firsts]
        return min(len(microbatch.indices) for plan in plans for microbatch in plan.microbatches)

    def close(self) -> None:
        """End the workers."""
        self._fetcher.close()


class EvalLoader:
    """One pass over the samples in their own order, for one rank; as many batches on every rank.

    Args:
        dataset: Samples by number.
        batch_size: Samples a batch, on all ranks together.
        rank: This rank.
        world_size: How many ranks there are.
        workers: Processes that read ahead; 0 reads in this one.
        static_shapes: Fill every batch up to its full size with samples of weight 0.
        max_samples: End after so many; None goes through all.
        collate: Puts a list of samples together, instead of the dataset's own or torch's.

    Attributes:
        num_samples: Samples in a pass, on all ranks together.

    Raises:
        DataError: If the dataset is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        static_shapes: bool = False,
        max_samples: int | None = None,
        collate: Collate | None = None,
    ) -> None:
        self.num_samples = min(_length(dataset), max_samples or sys.maxsize)
        self._num_batches = -(-self.num_samples // batch_size)
        share = -(-batch_size // world_size)
        base, order = _resolve(dataset, sequential)
        self._planner = Planner(self.num_samples, batch_size, share, rank, world_size, static_shapes, order)
        self._fetcher = _fetcher(Reader(base, 0, collate), workers)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        plans = islice(self._planner.steps(START), self._num_batches)
        for plan, data in self._fetcher.run(plans):
            yield _batch(plan.microbatches[0], data[0])

    def close(self) -> None:
        """End the workers."""
        self._fetcher.close()


def _length(dataset: Dataset) -> int:
    length = len(dataset)
    if length == 0:
        raise DataError(
            f"the dataset is empty: {type(dataset).__name__} has 0 samples",
            remedy="check the path and the filters that it is made with",
        )
    return length


def _resolve(dataset: Dataset, order: Order) -> tuple[Dataset, Order]:
    """See through a part of a dataset.

    Its rule is then computed for many samples at once, and samples keep the numbers they have in the whole.
    """
    if not isinstance(dataset, Part):
        return dataset, order
    locate = dataset.locate

    def located(epochs: Integers, positions: Integers) -> Integers:
        return locate(order(epochs, positions))

    return dataset.base, located


def _fetcher(reader: Reader, workers: int) -> Fetcher:
    return InWorkers(reader, workers) if workers else InProcess(reader)


def _batch(plan: MicrobatchPlan, data: Any) -> Batch:
    indices, num_valid, _ = plan
    return Batch(data, _weight(len(indices), num_valid), num_valid, indices)


@lru_cache(maxsize=64)
def _weight(samples: int, num_valid: int) -> Tensor:
    """Ones, then zeros; shape (samples,). Kept and shared, as few sizes occur: not to be written to."""
    weight = torch.zeros(samples)
    weight[:num_valid] = 1
    return weight
