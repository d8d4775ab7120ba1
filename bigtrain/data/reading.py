"""Reads the samples of a batch, in this process or in workers, with the same result.

Neither knows ranks or steps: they are given plans and answer with data. What goes wrong while reading ends as
one DataError that names the sample.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from bigtrain.data.mixing import Mixing
from bigtrain.data.plan import MicrobatchPlan, StepPlan
from bigtrain.data.randomness import is_random, seed_generators, untouched_generators
from bigtrain.errors import DataError
from bigtrain.protocols import Dataset

Collate = Callable[[list[Any]], Any]
Fetched = Iterator[tuple[StepPlan, list[Any]]]
"""Each plan with the data of its microbatches."""


class Reader:
    """Makes a batch of samples: `reader(epoch, indices)`.

    Args:
        dataset: Where the samples are.
        seed: Of the random choices about them.
        collate: Puts a list of samples together; the dataset's own, or torch's, where it is None.
        mixing: Mixes each sample with the one before it; None leaves them as they are.
    """

    def __init__(
        self, dataset: Dataset, seed: int, collate: Collate | None = None, mixing: Mixing | None = None
    ) -> None:
        self._mixing = mixing
        self._dataset = dataset
        self._seed = seed
        own_collate = collate or getattr(dataset, "collate", None)
        self._collate: Collate = own_collate or default_collate
        self._must_collate = own_collate is not None
        self._is_random = is_random(dataset)
        self._read_many = None if self._is_random else getattr(dataset, "__getitems__", None)

    def __call__(self, epoch: int, indices: list[int], before: int = -1) -> Any:
        """The batch of these samples.

        Args:
            epoch: Counted from 0.
            indices: Of the samples.
            before: The sample with which the first one is mixed, where samples are mixed.

        Raises:
            DataError: If a sample cannot be read, naming it, or the samples do not fit into one batch.
        """
        if self._mixing is None:
            return self._read(epoch, indices)
        return self._mixing(epoch, indices, self._read(epoch, [before, *indices]))

    def _read(self, epoch: int, indices: list[int]) -> Any:
        if self._read_many is not None:
            try:
                samples = self._read_many(indices)
            except Exception as error:
                raise self._culprit(indices, error) from error
        elif self._is_random:
            with untouched_generators():
                samples = [self._seeded(epoch, index) for index in indices]
        else:
            samples = [self._one(index) for index in indices]
        if not self._must_collate and not isinstance(samples, list):
            return samples
        try:
            return self._collate(samples)
        except Exception as error:
            raise _cannot_collate(indices, error) from error

    def _culprit(self, indices: list[int], error: Exception) -> DataError:
        """The error for a batch that cannot be read; its samples are read one by one, to find the one that fails."""
        for index in indices:
            self._one(index)
        return cannot_read(indices, error)

    def _seeded(self, epoch: int, index: int) -> Any:
        seed_generators(self._seed, epoch, index)
        return self._one(index)

    def _one(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:
            raise cannot_read([index], error) from error


def cannot_read(indices: Sequence[int], error: Exception) -> DataError:
    """The error for samples that cannot be read: it names the sample, or the range where it is not known which."""
    place = f"sample {indices[0]}" if len(indices) == 1 else f"a batch of samples {min(indices)} … {max(indices)}"
    if isinstance(error, DataError):
        return DataError(error.problem, where=f"{place}: {error.where}" if error.where else place, remedy=error.remedy)
    return DataError(
        f"{place} cannot be read: {type(error).__name__}: {error}",
        where=place,
        remedy="repair or leave out that sample; --debug shows the traceback of the dataset itself",
    )


def _cannot_collate(indices: list[int], error: Exception) -> DataError:
    return DataError(
        f"samples cannot be put together into one batch: {type(error).__name__}: {error}",
        where=f"samples {', '.join(map(str, indices[:8]))}{', …' if len(indices) > 8 else ''}",
        remedy="make all samples alike in shape and type (data.transforms), or give the dataset a collate",
    )


class Fetcher(Protocol):
    """Turns plans into data."""

    def run(self, plans: Iterator[StepPlan]) -> Fetched:
        """Fetch in the order of the plans."""

    def close(self) -> None:
        """Leave nothing behind."""


class InProcess:
    """Fetches when asked, in this process."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def run(self, plans: Iterator[StepPlan]) -> Fetched:
        """Fetch in the order of the plans."""
        read = self._reader
        for plan in plans:
            yield plan, [read(plan.epoch, *_request(microbatch)) for microbatch in plan.microbatches]

    def close(self) -> None:
        """Nothing was started."""


class InWorkers:
    """Fetches ahead in worker processes, through torch's DataLoader; a request is one microbatch.

    Workers outlive a `run` that came to its end, for the next one; a run that is left early ends its workers.
    """

    def __init__(self, reader: Reader, workers: int) -> None:
        self._reader = reader
        self._workers = workers
        self._pools: list[_Pool] = []

    def run(self, plans: Iterator[StepPlan]) -> Fetched:
        """Fetch in the order of the plans."""
        pool = next((pool for pool in self._pools if not pool.is_busy), None)
        if pool is None:
            pool = _Pool(self._reader, self._workers)
            self._pools.append(pool)
        try:
            yield from pool.run(plans)
        except BaseException:
            pool.close()
            self._pools = [other for other in self._pools if other is not pool]
            raise

    def close(self) -> None:
        """End all workers."""
        while self._pools:
            self._pools.pop().close()


def _request(microbatch: MicrobatchPlan) -> tuple[list[int], int]:
    """What of a microbatch has to be read."""
    return microbatch.indices, microbatch.before


class _Requests:
    """What a DataLoader takes its indices from; each worker receives (epoch, indices, the sample before)."""

    def __init__(self) -> None:
        self.source: Iterator[tuple[int, list[int], int]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, list[int], int]]:
        return self.source


class _Answers(torch.utils.data.Dataset[Any]):
    """What a DataLoader sees as a dataset: it answers requests."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, request: tuple[int, list[int], int]) -> Any:
        # Returned, not raised: an exception that DataLoader carries arrives as text, without its fields.
        try:
            return self._reader(*request)
        except DataError as error:
            error.add_note("In the data worker:\n" + traceback.format_exc())
            return error


def _leave_signals_to_the_rank(worker: int) -> None:
    """A scheduler sends its signals to every process of a rank: a worker that ends of them would fail the rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _same(data: Any) -> Any:
    return data


class _Pool:
    """A DataLoader and its workers."""

    def __init__(self, reader: Reader, workers: int) -> None:
        self.is_busy = False
        self._requests = _Requests()
        self._loader = DataLoader(
            _Answers(reader),
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_same,
            persistent_workers=True,
            worker_init_fn=_leave_signals_to_the_rank,
            # Whatever Python's default is: forked workers share the memory of the dataset, others would get a copy.
            multiprocessing_context="fork",
            # Its own generator: DataLoader draws the seed of its workers from the global one otherwise.
            generator=torch.Generator(),
        )
        self._answers: Any = None

    def run(self, plans: Iterator[StepPlan]) -> Fetched:
        self.is_busy = True
        asked: deque[StepPlan] = deque()

        def requests() -> Iterator[tuple[int, list[int], int]]:
            for plan in plans:
                asked.append(plan)
                for microbatch in plan.microbatches:
                    yield plan.epoch, *_request(microbatch)

        self._requests.source = requests()
        self._answers = iter(self._loader)
        while (first := self._next()) is not None:
            plan = asked.popleft()
            yield plan, [first, *(self._next() for _ in plan.microbatches[1:])]
        self.is_busy = False

    def _next(self) -> Any:
        try:
            answer = next(self._answers, None)
        except (RuntimeError, OSError, EOFError) as error:  # a dead worker shows as any of these
            raise DataError(
                f"data did not arrive from a worker: {type(error).__name__}: {error}",
                remedy="most often memory ran out: take fewer data.workers or smaller batches; with\n"
                "data.workers=0 samples are read in this process",
            ) from error
        if isinstance(answer, DataError):
            raise answer
        return answer

    def close(self) -> None:
        if self._answers is not None:
            # Dropping it would do the same, but only when the garbage collector comes by. torch reports a
            # worker that died from a signal handler, that is from any line, this one too.
            with suppress(RuntimeError):
                self._answers._shutdown_workers()
            for worker in self._answers._workers:
                worker.kill()  # it takes no notice of SIGTERM
            self._answers = None
