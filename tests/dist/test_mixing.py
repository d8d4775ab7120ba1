"""Mixup, CutMix and RandAugment: the same losses under every engine and number of processes; parity proves it, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import bigtrain
from bigtrain import parity
from bigtrain.config.loader import from_dict
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import losses


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 10))


def config(folder: str, layout: str) -> dict[str, Any]:
    return {
        "run": {"name": layout, "dir": folder, "seed": 4},
        "task": {"name": "classification", "args": {"label_smoothing": 0.1, "class_weights": [1.0, 2.0] * 5}},
        "model": f"{__name__}:small",
        "data": {
            "name": "digits",
            "args": {"size": 12},
            "batch_size": 50,
            "mix": {"mixup": 0.3, "cutmix": 1.0, "share": 0.8},
            "transforms": {"train": [{"name": "RandAugment", "args": {"num_ops": 1}}]},
            "eval": "none",
        },
        "train": {"steps": 6, "micro_batch_size": 9},
        "engine": engine_of(layout),
        "track": {"log_every": 1, "progress": "none"},
    }


def train(folder: str, layout: str) -> None:
    bigtrain.train(config(folder, layout))


def test_the_same_losses_everywhere(tmp_path: Path) -> None:
    for layout, size in (("single", 1), ("ddp", 2), ("fsdp", 3), ("zero2", 2)):
        run_distributed(train, size, str(tmp_path), layout)
    expected = losses(tmp_path / "single")
    assert len(expected) == 6
    for layout in ("ddp", "fsdp", "zero2"):
        for ours, theirs in zip(losses(tmp_path / layout), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), layout


@pytest.mark.slow
def test_parity_mixes_by_itself_and_finds_the_same(tmp_path: Path) -> None:
    values = from_dict(config(str(tmp_path), "single")).config
    options = {"engines": ["single", "ddp"], "precisions": ["fp32"], "compiles": False}
    report = parity.run(values, steps=6, **options)  # type: ignore[arg-type]
    assert [verdict.outcome for verdict in report.verdicts] == ["same"] * 6
