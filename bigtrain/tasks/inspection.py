"""A first look at a batch and at what a model makes of it: what does not fit is refused before step one.

This may be slow, and may read values; the losses may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import BigtrainError, DataError
from bigtrain.named import place_of
from bigtrain.protocols import Batch, Dataset
from bigtrain.tasks.tensors import describe


def pair(batch: Batch, names: str) -> tuple[Any, Tensor]:
    """The two parts of a batch, of which the second is a tensor with samples first.

    Args:
        batch: What to take apart.
        names: What the parts are, for the message.

    Raises:
        DataError: Where the batch is something else.
    """
    data = batch.data
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], Tensor):
        raise DataError(
            f"the data give {describe(data)}, and this task needs pairs ({names})",
            where="data.name",
            remedy="use a dataset whose samples are such pairs, or a task of your own",
        )
    if data[1].ndim == 0 or len(data[1]) != len(batch):
        raise DataError(f"a batch of {len(batch)} samples ({names}) is {describe(data)}", where="data")
    return data[0], data[1]


def check_tokens(dataset: Dataset, vocab: int | None) -> None:
    """Refuse data whose largest token, where they tell, is outside the model's vocabulary.

    Raises:
        DataError: Naming both.
    """
    largest = getattr(getattr(dataset, "base", dataset), "largest_token", None)
    if largest is not None and vocab is not None and largest >= vocab:
        raise DataError(
            f"token {largest} of the data is outside the model's vocabulary of {vocab}",
            where="data.args.tokenizer",
            remedy="give the tokenizer that the model was trained with",
        )


def try_on(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """What a model in evaluation mode returns for inputs on the host; nothing of it is left behind.

    On a model without memory (the meta device) this computes shapes alone. A model that is already cut up
    over ranks must be tried on all of them.

    Raises:
        DataError: Where the model cannot take the inputs.
    """
    like = next(model.parameters(), torch.empty(0))
    try:
        with _untouched(model), torch.no_grad():
            return model(*_placed(inputs, like), **_placed(named, like))
    except (BigtrainError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        raise DataError(
            f"the model cannot take a batch of the data: {type(cause).__name__}: {cause}",
            where=f"{place_of(cause)}; inputs: {', '.join(describe(value) for value in (*inputs, *named.values()))}",
            remedy="let the data (data.args, data.transforms) and the model (model.args) fit each other;\n"
            "--debug shows the model's own traceback",
        ) from cause


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Leave a model's modes, its running statistics and the random numbers as they are."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _placed(value: Any, like: Tensor) -> Any:
    """Inputs on the device of a parameter, floating tensors in its dtype."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: _placed(item, like) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_placed(item, like) for item in value]
    return value


def sample(indices: Sequence[int], position: int) -> str:
    """What to call the sample at a position, given the samples' indices in the dataset where they are known."""
    if position < len(indices):
        return f"sample {indices[position]} of the dataset"
    return f"sample {position} of the batch"
