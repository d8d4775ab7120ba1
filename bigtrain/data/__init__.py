"""Data by name, and batches for one rank.

`build` makes the datasets of a run file; `TrainLoader` and `EvalLoader` cut them into batches. A source is a
function `factory(split, **args)`, ours and a user's alike. This package knows neither models nor engines nor
devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NoReturn

from torch.utils.data import DataLoader, IterableDataset

from bigtrain.catalogue import DATA, DATA_OF_TEXT, TORCHVISION
from bigtrain.config.combinations import of_evaluation
from bigtrain.data.fingerprints import Digest, fingerprint
from bigtrain.data.loader import EvalLoader, StepBatch, TrainLoader
from bigtrain.data.mixing import Mixed, Mixing
from bigtrain.data.plan import Position
from bigtrain.data.split import split
from bigtrain.data.transforms import Named, Transformed
from bigtrain.errors import DataError
from bigtrain.named import call, load, suggest
from bigtrain.protocols import Dataset

__all__ = [
    "DataSets",
    "EvalLoader",
    "Mixed",
    "Mixing",
    "Position",
    "StepBatch",
    "TrainLoader",
    "build",
    "combine",
    "create",
    "with_tokenizer",
]


@dataclass(frozen=True)
class DataSets:
    """What a run reads.

    Attributes:
        train: The samples to train on.
        eval: The samples to evaluate on; None where there are none.
        fingerprint: Changes when either does.
    """

    train: Dataset
    eval: Dataset | None
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """Data by name."""

    name: str
    args: Mapping[str, Any]


def with_tokenizer(name: str, args: Mapping[str, Any], tokenizer: str | None) -> Mapping[str, Any]:
    """The args of a source, and among them the model's own tokenizer where it needs one and none is named."""
    if tokenizer is None or name not in DATA_OF_TEXT or "tokenizer" in args:
        return args
    return {**args, "tokenizer": tokenizer}


def create(name: str, split: str, args: Mapping[str, Any] | None = None, *, where: str = "data") -> Dataset:
    """A dataset by name.

    Args:
        name: One of ours, `torchvision/<Dataset>`, or `package.module:factory`; `factory(split, **args)`
            returns a dataset.
        split: `train` or `eval`.
        args: Its arguments.
        where: The key of the run file that holds `name` and `args`, for errors.

    Raises:
        DataError: If there is no such source, an argument does not fit, or no usable dataset comes out.
    """
    args = dict(args or {})
    if name.startswith(TORCHVISION):
        from bigtrain.data import torchvision_datasets

        made: Any = torchvision_datasets.create(name.removeprefix(TORCHVISION), split, args, where=where)
    else:
        factory: Callable[..., Any] = load(_find(name, where), error=DataError, where=f"{where}.name")
        _check_split(factory, name, where)
        try:
            made = call(partial(factory, split), args, name=name, error=DataError, where=f"{where}.args")
        except DataError as error:
            # A source does not know which section of the run file it is made for.
            if error.where and error.where.startswith("data.args"):
                error.where = where + error.where.removeprefix("data")
            raise
    return checked(made, name, where=where)


def build(
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    evaluation: float | Named | None = None,
    tokenizer: str | None = None,
    split_seed: int = 0,
    train_transforms: Sequence[Named] = (),
    eval_transforms: Sequence[Named] = (),
) -> DataSets:
    """The datasets of a run file.

    Args:
        name: As for `create`.
        args: As for `create`.
        evaluation: A share of the samples to hold out; data of their own, by name and args; or None.
        tokenizer: What text is read with where its args name none: the model's folder.
        split_seed: Chooses the samples that are held out.
        train_transforms: What is done to the images of training samples.
        eval_transforms: What is done to the images of evaluation samples.

    Raises:
        DataError: If anything of it cannot be found or read, or does not fit together.
    """
    args = with_tokenizer(name, args or {}, tokenizer)
    if isinstance(evaluation, Named):
        evaluation = Source(evaluation.name, with_tokenizer(evaluation.name, evaluation.args, tokenizer))
        for clash in of_evaluation(name, args, evaluation.name, evaluation.args):
            raise DataError(clash.text, where=clash.key, remedy=clash.remedy)
    return combine(
        create(name, "train", args),
        evaluation,
        split_seed=split_seed,
        train_transforms=train_transforms,
        eval_transforms=eval_transforms,
    )


def combine(
    train: Dataset,
    evaluation: Dataset | Named | float | None = None,
    *,
    split_seed: int = 0,
    train_transforms: Sequence[Named] = (),
    eval_transforms: Sequence[Named] = (),
) -> DataSets:
    """A dataset that exists already, made ready for loaders, and what it is evaluated on.

    Args:
        train: The samples to train on, and to hold a share out of.
        evaluation: The samples to evaluate on, as they are or by name and args; the share to hold out; or None.
        split_seed: Chooses the samples that are held out.
        train_transforms: What is done to the images of training samples.
        eval_transforms: What is done to the images of evaluation samples.

    Raises:
        DataError: If one is a stream or empty, or they do not fit together.
    """
    checked(train, type(train).__name__, where="data")
    seen_in_training = _transformed(train, train_transforms, "data.transforms.train")
    if evaluation is None:
        return DataSets(seen_in_training, None, fingerprint(train))
    if isinstance(evaluation, (int, float)):
        seen_in_evaluation = _transformed(train, eval_transforms, "data.transforms.eval")
        rest, held_out = split(seen_in_training, seen_in_evaluation, evaluation, split_seed)
        return DataSets(rest, held_out, str(Digest(fingerprint(train), f"{evaluation} {split_seed}")))
    if isinstance(evaluation, Named):
        args = evaluation.args
        if evaluation.name == "text_classification" and hasattr(train, "class_names"):
            args = {"labels": train.class_names, **args}  # of which its own file may lack some
        evaluation = create(evaluation.name, "eval", args, where="data.eval")
    checked(evaluation, type(evaluation).__name__, where="data.eval")
    _check_same_classes(train, evaluation)
    seen_in_evaluation = _transformed(evaluation, eval_transforms, "data.transforms.eval")
    return DataSets(seen_in_training, seen_in_evaluation, str(Digest(fingerprint(train), fingerprint(evaluation))))


def checked(dataset: Any, name: str, *, where: str) -> Dataset:
    """The dataset, if its samples have numbers and there are any.

    Raises:
        DataError: If it is a stream, not a dataset at all, or empty.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader) or (isinstance(dataset, Mapping) and 0 not in dataset):
        _refuse_container(dataset, where)
    if dataset is None:
        raise DataError(f"{name} returned nothing", where=where, remedy="let it return a dataset")
    try:
        length = None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError):
        length = None
    if length is None or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is a stream{'' if kind == name else f', {kind}'}: it has no __len__ and __getitem__",
            where=where,
            remedy="number its samples: only then is their order the same for any number of processes, and\n"
            "can a run go on in the middle. Write the stream to files once and open them by number (for\n"
            "text, `bigtrain data pack` does so and data.name: tokens reads it), or keep an index of where\n"
            "samples begin",
        )
    if length == 0:
        raise DataError(
            f"the dataset {name} is empty",
            where=where,
            remedy="check the path and the filters that it is made with",
        )
    return dataset  # type: ignore[no-any-return]


def _refuse_container(given: Any, where: str) -> NoReturn:
    """Say what to take out of something that holds datasets."""
    if isinstance(given, Mapping):
        said = f"a {type(given).__name__} of {', '.join(map(str, given))}"
        remedy = "give one dataset, or a pair: to train on, and to evaluate on"
    else:
        said, remedy = "a DataLoader", "give its dataset, loader.dataset; data.batch_size and data.workers say the rest"
    raise DataError(f"the data are {said}, and a dataset is needed", where=where, remedy=remedy)


def _find(name: str, where: str) -> str:
    """Where the factory of a source lies, as `package.module:attribute`."""
    if ":" in name:
        return name
    if name not in DATA:
        remedy = (
            suggest(name, [*DATA, "torchvision/<Dataset>"], "sources") + "\ndata of your own are package.module:factory"
        )
        raise DataError(f"there are no data {name!r}", where=f"{where}.name", remedy=remedy)
    return DATA[name]


def _check_split(factory: Callable[..., Any], name: str, where: str) -> None:
    """Refuse a factory that cannot be told for which split it is asked; it would fail somewhere, of a text."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return  # not callable, or written in C: the call itself will tell
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    first = takes[0] if takes else None
    default = first.default if first else 0
    if first is None or not (default is first.empty or default is None or isinstance(default, str)):
        shown = ", ".join(["split", *(str(p) for p in parameters if p.name != "split")])
        raise DataError(
            f"{name} does not take the split as its first argument, and is asked for the splits train and eval",
            where=f"{where}.name",
            remedy=f"write it so: def {name.partition(':')[2]}({shown}); where it has no data\n"
            "of its own to evaluate on, hold out a share of them: data.eval: {split: 0.2}",
        )


def _transformed(dataset: Dataset, transforms: Sequence[Named], where: str) -> Dataset:
    if transforms or getattr(dataset, "has_pillow_images", False):
        return Transformed(dataset, transforms, where=where)
    return dataset


def _check_same_classes(train: Dataset, evaluation: Dataset) -> None:
    names, others = getattr(train, "class_names", None), getattr(evaluation, "class_names", None)
    if names and others and list(names) != list(others):
        different = next(pair for pair in zip_longest(names, others) if pair[0] != pair[1])
        raise DataError(
            f"training and evaluation have different classes: {different[0]!r} and {different[1]!r}",
            where="data.eval",
            remedy="give both the same classes, so that labels mean the same",
        )
