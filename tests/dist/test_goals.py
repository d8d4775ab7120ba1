"""Ranks whose own numbers differ decide alike: to stop, and which checkpoint is the best."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.checkpoint import best_of
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed
from tests.helpers.scripted import STEPS, config

SCORES = [0.0, 0.3, 0.6, 0.5, 0.605, 0.2, 0.1, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2]
RISING = [number / STEPS for number in range(STEPS + 1)]


def train(folder: str, layout: str) -> tuple[int, str]:
    values = config(Path(folder), SCORES, engine=engine_of(layout))
    values["run"]["name"] = layout
    values["task"]["args"]["others"] = RISING  # what rank 1 measures would never stop
    values["eval"]["early_stop"] = {"metric": "score", "patience": 3}
    values["checkpoint"] |= {"keep_best": "score"}
    run = bigtrain.train(values)
    return run.outcome.steps, best_of(run.path).name


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero2"])
def test_ranks_decide_alike(tmp_path: Path, layout: str) -> None:
    assert run_distributed(train, 2, str(tmp_path), layout) == [(7, "step-00000004")] * 2
