"""The arithmetic of batches: who reads how many samples in a step, and how many steps there are.

It is not done here: a training loader is asked, over numbers instead of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config.schema import Config
from bigtrain.data import Position, TrainLoader


@dataclass(frozen=True)
class Batches:
    """How a step's samples are divided.

    Attributes:
        batch_size: Samples a full step, on all ranks together.
        world_size: How many ranks there are.
        most: The samples of each microbatch of a full step, on the first rank, which has most.
        fewest: The same on the last rank, which has fewest; 0 repeats a sample with weight 0.
        num_samples: Samples in an epoch; None where that is not known.
        steps_per_epoch: Steps in an epoch; None where that is not known.
        last_step: Samples in an epoch's last step; None where that is not known.
        total_steps: Steps of the run; None where that is not known.
        epochs: Epochs of the run, if it is given so.
    """

    batch_size: int
    world_size: int
    most: tuple[int, ...]
    fewest: tuple[int, ...]
    num_samples: int | None
    steps_per_epoch: int | None
    last_step: int | None
    total_steps: int | None
    epochs: int | None


def divide(config: Config, world_size: int, num_samples: int | None) -> Batches:
    """Divide the samples of a run among ranks, steps and microbatches.

    Args:
        config: The run file.
        world_size: How many ranks.
        num_samples: Samples to train on; None where that is not known.
    """
    batch_size = config.data.batch_size
    first, last = (_loader(config, world_size, rank, num_samples or batch_size) for rank in (0, world_size - 1))
    steps = first.steps_per_epoch
    ending = next(first.steps(Position(0, (steps - 1) * batch_size)))
    return Batches(
        batch_size,
        world_size,
        most=_sizes(first),
        fewest=_sizes(last),
        num_samples=num_samples,
        steps_per_epoch=steps if num_samples else None,
        last_step=ending.num_samples if num_samples else None,
        total_steps=config.train.steps or ((config.train.epochs or 0) * steps if num_samples else None),
        epochs=config.train.epochs,
    )


def _loader(config: Config, world_size: int, rank: int, num_samples: int) -> TrainLoader:
    return TrainLoader(
        range(num_samples),
        batch_size=config.data.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        world_size=world_size,
    )


def _sizes(loader: TrainLoader) -> tuple[int, ...]:
    """The samples that count in each microbatch of the first step."""
    return tuple(batch.num_valid for batch in next(loader.steps()).microbatches)
