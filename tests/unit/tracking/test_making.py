"""A run file's trackers in whole runs: W&B, TensorBoard and the user's own beside the training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bigtrain
from bigtrain.errors import SetupError
from bigtrain.tracking import wandb_files
from bigtrain.tracking.reading import load_run


def config(folder: Path, **track: object) -> dict[str, object]:
    return {
        "run": {"dir": str(folder / "runs"), "name": "it"},
        "task": "classification",
        "model": {"name": "simple_cnn"},
        "data": {"name": "synthetic", "args": {"kind": "classification", "samples": 20}, "batch_size": 4},
        "train": {"epochs": 2},
        "engine": {"device": "cpu"},
        "track": {"progress": "none", "log_every": 1, **track},
    }


def test_all_at_once_show_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "own_tracker.py").write_text(
        "import json\n"
        "class Own:\n"
        "    def __init__(self, path): self.file = open(path, 'w')\n"
        "    def log(self, row): self.file.write(json.dumps(row) + '\\n')\n"
        "    def close(self): self.file.close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"name": "own_tracker:Own", "args": {"path": str(tmp_path / "own")}}
    run = bigtrain.train(config(tmp_path, wandb="offline", tensorboard=True, trackers=[own]))
    metrics = load_run(run.path).metrics
    rows = [row for row in run.history() if "event" not in row]
    assert [row for row in map(json.loads, (tmp_path / "own").read_text().splitlines()) if "event" not in row] == rows

    board = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    (path,) = wandb_files.logs(run.path, (run.path / "wandb_id").read_text().strip())
    at_wandb = list(wandb_files.history(path))
    names = set(metrics) - {"train/epoch", "train/time"}
    assert {"train/loss", "train/lr", "train/grad_norm", "train/samples_per_s", "eval/accuracy"} <= names
    assert set(board.Tags()["scalars"]) == names
    for name in names:
        steps, values = metrics[name]
        assert [event.step for event in board.Scalars(name)] == steps.tolist()
        sent = [(int(row["train/step"]), float(row[name])) for row in at_wandb if name in row]
        assert sent == list(zip(steps.tolist(), values.tolist(), strict=True))


def test_one_that_is_not_there_is_found_out_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no module 'nowhere'"):
        bigtrain.train(config(tmp_path, trackers=["nowhere:Tracker"]))
    assert list(tmp_path.iterdir()) == []


def test_one_without_the_two_methods_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_tracker.py").write_text("class Half:\n    def log(self, row): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SetupError, match="the tracker half_tracker:Half has no close"):
        bigtrain.train(config(tmp_path, trackers=["half_tracker:Half"]))
    assert not (tmp_path / "runs").exists()


def test_wandb_disabled_and_nothing_else_needs_no_process(tmp_path: Path) -> None:
    run = bigtrain.train(config(tmp_path, wandb="disabled"))
    assert not (run.path / "wandb_id").exists()
    assert not (run.path / "attempts/0/logs/trackers.log").exists()


@pytest.mark.slow
def test_only_rank_0_has_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    file = tmp_path / "it.yaml"
    # A tracker of the user's own: its module is the user's code, which ranks compare before they begin.
    (tmp_path / "counting.py").write_text(
        "class Count:\n    def log(self, row): open('rows', 'a').write('x')\n    def close(self): ...\n"
    )
    file.write_text(json.dumps(config(tmp_path, wandb="auto", trackers=["counting:Count"])))
    command = [sys.executable, "-m", "bigtrain", "launch", str(file), "--nproc=2", "engine.name=ddp"]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, capture_output=True)
    assert len((tmp_path / "rows").read_text()) == 14
    folder = tmp_path / "runs" / "it"
    assert len(list((folder / "wandb").glob("*run-*"))) == 1
    assert (
        len((folder / "metrics.jsonl").read_text().splitlines()) == 14
    )  # ten steps, two evaluations, a start and a checkpoint
