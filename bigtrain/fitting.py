"""Whether data, model and task fit one another: found out with two samples, before anything is wrapped."""

from __future__ import annotations

from torch import nn

from bigtrain.data import DataSets, TrainLoader
from bigtrain.dist import World
from bigtrain.protocols import Task
from bigtrain.tasks.measured import check_metrics

# How many samples of the first microbatch are tried on the model before the first step.
_TRIED_SAMPLES = 2


def try_first_batch(task: Task, model: nn.Module, sets: DataSets, world: World, seed: int) -> None:
    """Let the task refuse data and a model that do not fit, and see that its metrics are some. Every rank must call it.

    Args:
        task: Asked where it has `check` (one batch) and `check_data` (what a dataset says of all its samples).
        model: The plain model; on the meta device shapes alone are computed.
        sets: The data.
        world: The ranks.
        seed: Of the order of the samples.
    """
    if sets.eval is not None:
        check_metrics(task)
    check = getattr(task, "check", None)
    if check is None:
        return
    loader = TrainLoader(
        sets.train, batch_size=_TRIED_SAMPLES * world.size, rank=world.rank, world_size=world.size, seed=seed
    )
    look = getattr(task, "check_data", None)
    try:
        check(model, next(loader.steps()).microbatches[0])
    finally:  # what is said of all samples tells more than what is wrong with one
        for dataset in (sets.train, sets.eval):
            if look is not None and dataset is not None:
                look(dataset)
