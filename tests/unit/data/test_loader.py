"""Batches: the same data in the same order for any number of workers, and errors that name the sample."""

import multiprocessing
import os
import pickle
import random
import signal
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from bigtrain.data import EvalLoader, Position, TrainLoader
from bigtrain.data.split import split
from bigtrain.errors import DataError

# Python 3.12 and later warn of what torch's DataLoader does on Linux: fork in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


class Noisy:
    """Draws from all three global generators, as augmentations do."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index, torch.rand(2), np.random.rand(2), random.random()


class Squares:
    """Answers whole batches, and says how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor(index**2)

    def __getitems__(self, indices):
        self.calls += 1
        return torch.tensor(indices) ** 2


class Damaged(Squares):
    """Sample 7 cannot be read, alone or in a batch."""

    def __getitem__(self, index):
        if index == 7:
            raise OSError("unexpected end of file")
        return torch.tensor(index**2)

    def __getitems__(self, indices):
        return torch.stack([self[index] for index in indices])


class DamagedAlone(Damaged):
    """The same, read sample by sample."""

    __getitems__ = None
    is_random = True


class Deadly(Squares):
    """Ends the process that reads sample 7, as the kernel does when memory runs out."""

    def __getitems__(self, indices):
        if 7 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)


def flat(data):
    """Everything in a batch as one row of numbers."""
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).reshape(-1) for part in data])


def read(dataset, workers, steps, **options):
    loader = TrainLoader(dataset, batch_size=6, micro_batch_size=2, seed=3, workers=workers, **options)
    try:
        return list(islice(loader.steps(), steps))
    finally:
        loader.close()


# ---------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_the_samples_it_names():
    for step in read(Squares(), 0, 4):
        for batch in step.microbatches:
            assert batch.data.tolist() == [index**2 for index in batch.indices]
            assert batch.num_valid == len(batch) == len(batch.indices)
            assert batch.weight.tolist() == [1.0] * len(batch)


def test_fills_up_with_weight_zero():
    # 10 samples in steps of 6 on 4 ranks, at most 2 each: the second step has 4, one a rank.
    loaders = [TrainLoader(Squares(), batch_size=6, rank=r, world_size=4, static_shapes=True) for r in range(4)]
    ranks = [list(islice(loader.steps(), 2)) for loader in loaders]
    weights = [[batch.weight.tolist() for step in steps for batch in step.microbatches] for steps in ranks]
    assert weights == [[[1, 1], [1, 0]], [[1, 1], [1, 0]], [[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    for steps in ranks:
        for step in steps:
            (batch,) = step.microbatches
            assert batch.indices[batch.num_valid :] == [batch.indices[batch.num_valid - 1]] * (2 - batch.num_valid)


def test_a_rank_without_samples_repeats_one_of_the_step():
    steps = [next(TrainLoader(Squares(), batch_size=3, rank=r, world_size=5, seed=1).steps()) for r in range(5)]
    batches = [step.microbatches[0] for step in steps]
    assert [batch.num_valid for batch in batches] == [1, 1, 1, 0, 0]
    assert batches[3].weight.tolist() == batches[4].weight.tolist() == [0.0]
    assert batches[3].indices == batches[4].indices == batches[2].indices


def test_steps_say_where_they_are():
    loader = TrainLoader(Squares(), batch_size=4)
    assert loader.steps_per_epoch == 3
    steps = list(islice(loader.steps(Position(2, 4)), 3))
    assert [(s.epoch, s.step_in_epoch, s.num_samples, s.ends_epoch) for s in steps] == [
        (2, 1, 4, False),
        (2, 2, 2, True),
        (3, 0, 4, False),
    ]
    assert [step.end for step in steps] == [(2, 8), (3, 0), (3, 4)]


def test_going_on_from_a_position_is_as_never_having_stopped():
    through = read(Noisy(), 0, 9)
    again = TrainLoader(Noisy(), batch_size=6, micro_batch_size=2, seed=3)
    for before, expected in pairwise(through):
        step = next(again.steps(before.end))
        assert step.end == expected.end
        for batch, other in zip(step.microbatches, expected.microbatches, strict=True):
            assert torch.equal(flat(batch.data), flat(other.data))


def test_whole_batches_are_asked_for_where_the_dataset_can():
    dataset = Squares()
    read(dataset, 0, 4)
    assert dataset.calls == 3 + 2 + 3 + 2


def test_samples_of_a_part_keep_their_numbers_in_the_whole():
    dataset = Squares()
    train, held_out = split(dataset, dataset, 0.3, 0)
    seen = [i for step in islice(TrainLoader(train, batch_size=7).steps(), 1) for i in step.microbatches[0].indices]
    batches = list(EvalLoader(held_out, batch_size=2))
    assert sorted(seen + [i for batch in batches for i in batch.indices]) == list(range(10))
    assert all(batch.data.tolist() == [i**2 for i in batch.indices] for batch in batches)


def test_collate_of_the_caller_goes_before_that_of_the_dataset():
    class Worded(Noisy):
        def collate(self, samples):
            return f"{len(samples)} samples"

    assert read(Worded(), 0, 1)[0].microbatches[0].data == "2 samples"
    assert read(Worded(), 0, 1, collate=len)[0].microbatches[0].data == 2


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4, 13])
def test_evaluation_sees_every_sample_once_in_order(world):
    ranks = [list(EvalLoader(Squares(), batch_size=4, rank=r, world_size=world)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {3}
    counted = [i for step in zip(*ranks, strict=True) for batch in step for i in batch.indices[: batch.num_valid]]
    assert counted == list(range(10))


def test_evaluation_ends_after_so_many_samples():
    loader = EvalLoader(Squares(), batch_size=4, max_samples=7)
    assert (len(loader), loader.num_samples) == (2, 7)
    assert [batch.indices for batch in loader] == [[0, 1, 2, 3], [4, 5, 6]]
    assert len(EvalLoader(Squares(), batch_size=4, max_samples=36)) == 3


def test_evaluation_can_be_repeated_by_the_same_workers():
    loader = EvalLoader(Squares(), batch_size=4, workers=2)
    first = [batch.data.tolist() for batch in loader]
    pids = {child.pid for child in multiprocessing.active_children()}
    assert [batch.data.tolist() for batch in loader] == first == [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    assert {child.pid for child in multiprocessing.active_children()} == pids
    assert len(pids) == 2
    loader.close()
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------- randomness


def test_any_number_of_workers_gives_the_same_numbers():
    reference = read(Noisy(), 0, 9)  # more than two epochs of 23 samples
    for workers in (1, 2):
        for step, expected in zip(read(Noisy(), workers, 9), reference, strict=True):
            assert step.end == expected.end
            for batch, other in zip(step.microbatches, expected.microbatches, strict=True):
                assert batch.indices == other.indices
                assert torch.equal(flat(batch.data), flat(other.data))


def test_random_choices_depend_on_the_sample_and_the_epoch_only():
    def by_sample(**options):
        loader = TrainLoader(Noisy(), seed=3, **options)
        steps = islice(loader.steps(), 2 * loader.steps_per_epoch)
        found = {}
        for step in steps:
            for batch in step.microbatches:
                for row, index in enumerate(batch.indices):
                    found[step.epoch, index] = flat([part[row] for part in batch.data[1:]])
        return found

    one, other = by_sample(batch_size=23), by_sample(batch_size=5, micro_batch_size=3)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(torch.equal(one[0, index], one[1, index]) for index in range(23))
    assert len({tuple(one[0, index].tolist()) for index in range(23)}) == 23


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_process_are_left_alone(workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    read(Noisy(), workers, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_a_subset_of_random_samples_is_random():
    subset = torch.utils.data.Subset(Noisy(), range(12))  # has __getitems__ of its own
    one, other = read(subset, 0, 2), read(subset, 0, 2)
    assert torch.equal(flat(one[1].microbatches[0].data), flat(other[1].microbatches[0].data))


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Damaged(), DamagedAlone()], ids=["batches", "samples"])
def test_a_sample_that_cannot_be_read_is_named(dataset, workers):
    with pytest.raises(DataError, match="sample 7 cannot be read: OSError: unexpected end of file") as caught:
        read(dataset, workers, 4)
    assert caught.value.where == "sample 7"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not multiprocessing.active_children()


def test_an_error_from_a_worker_keeps_its_traceback_in_a_note():
    with pytest.raises(DataError) as caught:
        read(Damaged(), 1, 4)
    assert "test_loader.py" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_do_not_fit_together_are_said_to(workers):
    class Growing(Noisy):
        def __getitem__(self, index):
            return torch.zeros(index)

    with pytest.raises(DataError, match="cannot be put together into one batch"):
        read(Growing(), workers, 1)


def test_a_worker_that_dies_is_reported():
    with pytest.raises(DataError, match="did not arrive from a worker"):
        read(Deadly(), 1, 4)
    assert not multiprocessing.active_children()


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="has 0 samples"):
        TrainLoader([], batch_size=1)
    with pytest.raises(DataError, match="has 0 samples"):
        EvalLoader([], batch_size=1)


# -------------------------------------------------------------------------------------------- nothing is left


def test_a_generator_that_is_closed_leaves_no_worker():
    loader = TrainLoader(Squares(), batch_size=2, workers=2)
    steps = loader.steps()
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()


def test_two_passes_at_once_do_not_disturb_each_other():
    loader = TrainLoader(Squares(), batch_size=3, workers=1)
    alone = [step.microbatches[0].indices for step in islice(TrainLoader(Squares(), batch_size=3).steps(), 4)]
    one, other = loader.steps(), loader.steps()
    pairs = [(next(one).microbatches[0].indices, next(other).microbatches[0].indices) for _ in range(4)]
    assert pairs == [(indices, indices) for indices in alone]
    loader.close()
    assert not multiprocessing.active_children()
