"""Batches that a model cannot take, or would see more of than it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain.config.loader import from_dict
from bigtrain.data import DataSets, Position
from bigtrain.dist import World
from bigtrain.errors import CombinationError
from bigtrain.trainer import loaders


class Numbers(torch.utils.data.Dataset[Any]):
    """Seventeen samples of three numbers, in two classes."""

    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(index)).sin(), index % 2


def run_file(folder: Path, **train: int) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder)},
        "task": "classification",
        "model": "given:Model",
        "data": {"name": "given:Numbers", "batch_size": 4, "eval": "none"},
        "train": train,
        "track": {"progress": "none", "wandb": "disabled", "report": False},
    }


def with_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def with_layernorm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_a_batchnorm_that_would_be_left_with_one_number_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(CombinationError, match="one sample alone, of which '1' sees one number a channel") as caught:
        bigtrain.train(run_file(tmp_path, epochs=1), model=with_batchnorm, data=Numbers())
    assert caught.value.where == "data.batch_size"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "change"), [(with_layernorm, "train.steps=5"), (with_batchnorm, "data.batch_size=5")])
def test_one_sample_alone_where_it_does_no_harm(tmp_path: Path, make: Any, change: str) -> None:
    assert bigtrain.train(run_file(tmp_path, steps=5), change, model=make, data=Numbers()).outcome.steps == 5


def test_a_batchnorm_whose_run_ends_before_one_sample_is_alone(tmp_path: Path) -> None:
    assert bigtrain.train(run_file(tmp_path, steps=4), model=with_batchnorm, data=Numbers()).outcome.steps == 4


@pytest.mark.parametrize(("make", "sizes"), [(with_layernorm, [7, 7, 7]), (with_batchnorm, [7, 7, 3])])
def test_what_fills_up_a_batch_for_the_compiler_reaches_no_batchnorm(tmp_path: Path, make: Any, sizes: Any) -> None:
    config = from_dict({**run_file(tmp_path, epochs=1), "compile": "model"}, ["data.batch_size=7"]).config
    train, _ = loaders(config, DataSets(Numbers(), None, ""), World(), make())
    steps = [next(train.steps(Position(0, offset))) for offset in (0, 7, 14)]
    assert [len(microbatch) for step in steps for microbatch in step.microbatches] == sizes


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_so_many_batches_of_an_evaluation_are_the_same_samples_for_all(
    tmp_path: Path, micro: int | None, size: int
) -> None:
    values = {**run_file(tmp_path, epochs=1), "eval": {"max_batches": 2}}
    config = from_dict(values, [f"train.micro_batch_size={micro or 'null'}"]).config
    parts = [
        loaders(config, DataSets(Numbers(), Numbers(), ""), World(rank=rank, size=size))[1] for rank in range(size)
    ]
    seen = [index for part in parts if part for batch in part for index in batch.indices[: batch.num_valid]]
    assert sorted(seen) == list(range(8))
