"""Whether data, model and task fit one another: found out with two samples, before anything is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn

from bigtrain.data import DataSets, TrainLoader
from bigtrain.dist import World
from bigtrain.errors import CombinationError
from bigtrain.models.blocks import batchnorm_over_batch
from bigtrain.protocols import Task
from bigtrain.tasks.measured import check_metrics

# How many samples of the first microbatch are tried on the model before the first step.
_TRIED_SAMPLES = 2


def try_first_batch(
    task: Task, model: nn.Module, sets: DataSets, world: World, seed: int, smallest: int = _TRIED_SAMPLES
) -> None:
    """Let the task refuse data and a model that do not fit, and see that its metrics are some. Every rank must call it.

    Args:
        task: Asked where it has `check` (one batch) and `check_data` (what a dataset says of all its samples).
        model: The plain model; on the meta device shapes alone are computed.
        sets: The data.
        world: The ranks.
        seed: Of the order of the samples.
        smallest: How many samples the smallest microbatch to train on has.
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
        with _refusing_one_alone(model) if smallest == 1 and world.size == 1 else nullcontext():
            check(model, next(loader.steps()).microbatches[0])
    finally:  # what is said of all samples tells more than what is wrong with one
        for dataset in (sets.train, sets.eval):
            if look is not None and dataset is not None:
                look(dataset)


@contextmanager
def _refusing_one_alone(model: nn.Module) -> Iterator[None]:
    """Look at what reaches each BatchNorm: of one sample alone it may be one number a channel, which has no variance.

    Raises:
        CombinationError: Where it is; torch would say so in the last step of an epoch.
    """
    alone: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == _TRIED_SAMPLES * inputs[0].shape[1]:
            alone.append(name)

    names = batchnorm_over_batch(model)
    handles = [model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if alone:
        raise CombinationError(
            f"a microbatch of each epoch has one sample alone, of which {alone[0]!r} sees one number a channel: "
            "BatchNorm needs two to normalise by",
            where="data.batch_size",
            remedy="take another data.batch_size or train.micro_batch_size, so that no microbatch is left with one;\n"
            "or group norm (torchvision models: model.args.norm_layer=group_norm)",
        )
