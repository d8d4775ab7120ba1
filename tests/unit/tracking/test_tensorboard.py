"""TensorBoard's files, read back by TensorBoard itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.tensorboard import TensorBoard


def read(folder: Path) -> Any:
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": loss, "lr": [0.25, 0.5], "time": 1e9 + step}


def test_numbers_of_steps_and_evaluations(tmp_path: Path) -> None:
    tracker = TensorBoard(TrackedRun(str(tmp_path), "it"))
    for step in range(1, 301):
        tracker.log(row(step, 1 / step))
    tracker.log({"step": 300, "eval/accuracy": 0.75})
    tracker.log({"step": 300, "event": "checkpoint"})
    tracker.close()
    board = read(tmp_path)
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr/0", "train/lr/1", "eval/accuracy"}
    losses = board.Scalars("train/loss")
    assert [(e.step, e.wall_time) for e in losses] == [(step, 1e9 + step) for step in range(1, 301)]
    assert losses[1].value == 0.5
    assert [(e.step, e.value) for e in board.Scalars("eval/accuracy")] == [(300, 0.75)]


def test_a_restart_replaces_the_steps_it_takes_again(tmp_path: Path) -> None:
    first = TensorBoard(TrackedRun(str(tmp_path), "it"))
    for step in range(1, 18):
        first.log(row(step, 1.0))
    first.close()
    second = TensorBoard(TrackedRun(str(tmp_path), "it", step=10))
    for step in range(11, 21):
        second.log(row(step, 2.0))
    second.close()
    losses = read(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in losses] == [(step, 1.0 if step < 11 else 2.0) for step in range(1, 21)]


def test_what_was_not_written_before_a_kill_is_written_by_the_next_start(tmp_path: Path) -> None:
    """As where a whole machine goes: TensorBoard's writer keeps rows for seconds."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    first = TensorBoard(TrackedRun(str(tmp_path), "it"))
    evaluation = {"step": 10, "eval/accuracy": 0.75}
    for step in range(1, 18):
        metrics.log(row(step, 1.0))
        if step <= 6:
            first.log(row(step, 1.0))
        if step == 10:
            metrics.log(evaluation)
    metrics.close()
    first.close()
    second = TensorBoard(TrackedRun(str(tmp_path), "it", step=12))
    for step in range(13, 21):
        second.log(row(step, 2.0))
    second.close()
    TensorBoard(TrackedRun(str(tmp_path), "it", step=20)).close()  # what is there is not written again
    board = read(tmp_path)
    losses = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert losses == [(step, 1.0 if step < 13 else 2.0) for step in range(1, 21)]
    assert [e.step for e in board.Scalars("eval/accuracy")] == [10]


def test_steps_that_a_spike_undid_are_replaced(tmp_path: Path) -> None:
    tracker = TensorBoard(TrackedRun(str(tmp_path), "it"))
    for step in range(1, 18):
        tracker.log(row(step, 1.0))
    tracker.log({"step": 10, "event": "rollback", "text": "back to step 10"})
    for step in range(11, 21):
        tracker.log(row(step, 2.0))
    tracker.close()
    losses = read(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in losses] == [(step, 1.0 if step < 11 else 2.0) for step in range(1, 21)]


def test_histograms(tmp_path: Path) -> None:
    held = {"edges": [-1.0, 0.0, 1.0], "counts": [3, 5], "min": -0.5, "max": 0.5, "sum": 1.0, "sum_squares": 2.0}
    tracker = TensorBoard(TrackedRun(str(tmp_path), "it"))
    tracker.log({"step": 4, "histograms": {"layer.weight": held}})
    tracker.close()
    (event,) = read(tmp_path).Histograms("weights/layer.weight")
    value = event.histogram_value
    assert (event.step, value.num, value.min, value.max) == (4, 8, -0.5, 0.5)
    assert (value.bucket_limit, value.bucket) == ([0.0, 1.0], [3.0, 5.0])


def test_torch_is_not_needed(tmp_path: Path) -> None:
    code = f"""
import sys
from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.tensorboard import TensorBoard
from bigtrain.tracking import weights_and_biases, helper
tracker = TensorBoard(TrackedRun({str(tmp_path)!r}, "it"))
tracker.log({{"step": 1, "loss": 0.5}})
tracker.close()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
