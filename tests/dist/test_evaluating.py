"""Runs trained under fsdp by two ranks, evaluated in one process: the runs' own numbers, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import bigtrain
from bigtrain.evaluating import evaluate, find_checkpoint, opened
from tests.helpers import resuming, transfer
from tests.helpers.distributed import run_distributed

ENGINE = {"name": "fsdp", "device": "cpu"}


def language(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    made = resuming.config(folder, engine=ENGINE, **changes)
    made["run"]["name"] = name
    made["data"]["eval"] = {"split": 0.4}
    return made


def digits(folder: Path) -> dict[str, Any]:
    made = transfer.config(folder, "digits", list(range(10)), engine=ENGINE, train={"steps": 5, "micro_batch_size": 33})
    made["model"] = {"name": "bigmodel", "args": {"num_classes": 10}}
    made["data"]["args"]["size"] = 28
    return made


def plain(numbers: dict[str, Any]) -> dict[str, str]:
    """Every number to its last bit."""
    return {name: repr(value.tolist() if isinstance(value, Tensor) else value) for name, value in numbers.items()}


def train(settings: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [plain(bigtrain.train(each).evaluation) for each in settings]


def test_runs_of_two_ranks_under_fsdp_are_measured_exactly(tmp_path: Path) -> None:
    images = digits(tmp_path)
    images_in_bf16 = {**images, "run": {**images["run"], "name": "images-bf16"}, "precision": "bf16"}
    runs = [images, images_in_bf16, language(tmp_path, "gpt"), language(tmp_path, "bf16", precision="bf16")]
    for settings, theirs in zip(runs, run_distributed(train, 2, runs)[0], strict=True):
        with opened(find_checkpoint(settings["run"]["name"], tmp_path / "runs")) as trained:
            found = evaluate(trained)
        assert found.is_same_data
        assert plain(found.metrics) == theirs
