"""Steps of a run again: the same to the last bit, with the run's own samples, and nothing written."""

from __future__ import annotations

import pdb
from pathlib import Path
from typing import Any

import pytest

import bigtrain
from bigtrain.errors import RunFolderError
from bigtrain.replaying import replay
from bigtrain.tracking.reading import load_run
from bigtrain.trainer import Subject
from tests.unit.test_running import files
from tests.unit.tracking.test_making import config


@pytest.fixture
def trained(tmp_path: Path) -> bigtrain.Run:
    changes = ["checkpoint.every_steps=4", "checkpoint.keep=null", "eval.every_epochs=1", "optim.schedule.name=cosine"]
    return bigtrain.train(config(tmp_path), changes)


@pytest.mark.parametrize(("step", "first"), [(7, 5), (8, 5), (3, 1), (10, 9)])
def test_the_same_to_the_last_bit_and_nothing_written(trained: bigtrain.Run, step: int, first: int) -> None:
    before = files(trained.path)
    said: list[str] = []
    rows = replay(load_run(trained.path), step, said.append)
    assert [row["step"] for row in rows] == list(range(first, step + 1))
    history = {row["step"]: row for row in trained.history() if "loss" in row}
    for row in rows:
        for key in ("loss", "grad_norm", "lr", "samples", "epoch"):
            assert row[key] == history[row["step"]][key]
    assert said[-1].endswith(", as the run had it")
    assert files(trained.path) == before


def test_a_run_file_that_has_changed_since_is_told(trained: bigtrain.Run, tmp_path: Path) -> None:
    bigtrain.train(config(tmp_path), ["checkpoint.every_steps=4", "checkpoint.keep=null", "train.epochs=3"])
    said: list[str] = []
    replay(load_run(trained.path), 7, said.append)
    assert "optim.schedule.name: cosine → constant" in said[1]
    assert "train.epochs: 2 → 3" in said[1]
    assert "eval." not in said[1]
    assert said[-1] != said[1]


def test_other_processes_are_told_where_it_begins_with_the_first_step(trained: bigtrain.Run) -> None:
    (trained.path / "metrics.jsonl").write_text(
        (trained.path / "metrics.jsonl").read_text().replace('"world_size":1', '"world_size":2', 1)
    )
    said: list[str] = []
    replay(load_run(trained.path), 1, said.append)
    assert said[1].startswith("the run had 2 processes: ")


def test_another_step_than_the_runs_is_refused(trained: bigtrain.Run) -> None:
    with pytest.raises(RunFolderError, match="step 11 is none of the run's: it has 10"):
        replay(load_run(trained.path), 11, print)


def test_a_breakpoint_before_the_step(trained: bigtrain.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    said: list[str] = []
    monkeypatch.setattr("sys.breakpointhook", lambda *_: seen.append(len(said)))
    replay(load_run(trained.path), 7, said.append, stop_before=True)
    assert seen == [3]  # the word on the checkpoint, and two steps
    assert pdb  # what it would be


def test_autograd_names_what_makes_a_gradient_bad(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 32 * 32, 10)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            out: torch.Tensor = self.layer(x.flatten(1))
            return out + torch.sqrt(out * 0).sum() * 0 if self.calls > 6 else out

    given: Any = Bad
    with pytest.raises(bigtrain.errors.NonFiniteError):
        bigtrain.train(config(tmp_path), ["checkpoint.every_steps=4"], model=given)
    run = load_run(tmp_path / "runs" / "it")
    assert run.step == 6

    class BadAtOnce(Bad):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 5

    subject = Subject(model=lambda: BadAtOnce())
    with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError, match="returned nan values"):
        replay(run, 6, print, subject=subject, detect_anomaly=True)
