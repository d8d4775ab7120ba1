"""Early stopping and the best checkpoint: by written-out evaluations, broken off anywhere, on ranks that differ."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bigtrain
from bigtrain.checkpoint import best_of, find, find_best, open_checkpoint
from bigtrain.cli import app
from bigtrain.errors import CheckpointError, ConfigError, RunFolderError, UserError
from tests.helpers.resuming import BrokenOffError, break_off
from tests.helpers.scripted import STEPS, config

NAN = math.nan
# After each step, from none: the best is that after step 4, and 0.605 is no 0.01 better than 0.6.
SCORES = [0.0, 0.3, 0.6, 0.5, 0.605, 0.2, 0.1, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2]


def checkpoints(path: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in find(path / "checkpoints"))


def result(path: Path) -> dict:
    return json.loads((path / "result.json").read_text())


@pytest.mark.parametrize(
    ("scores", "early_stop", "end"),
    [
        (SCORES, {"metric": "score", "patience": 3}, 7),
        (SCORES, {"metric": "eval/score", "patience": 3, "min_delta": 0.01}, 5),
        (SCORES, {"metric": "score", "patience": 8}, 12),
        (SCORES, {"metric": "score", "patience": 9}, 12),
        (SCORES, {"metric": "score", "mode": "min", "patience": 2}, 3),
        ([0.0, NAN, 0.6, NAN, 0.7, NAN, NAN, *SCORES], {"metric": "score", "patience": 2}, 6),
        ([0.0, *[NAN] * STEPS], {"metric": "score", "patience": 4}, 4),
        ([0.0, math.inf, 0.1, *SCORES], {"metric": "score", "patience": 1}, 1),
    ],
)
def test_ends_when_evaluations_get_no_better(tmp_path, scores, early_stop, end):
    run = bigtrain.train(config(tmp_path, scores, eval={"early_stop": early_stop}))
    assert run.outcome.steps == end
    assert not run.outcome.stopped
    assert result(run.path)["steps"] == end
    assert result(run.path).get("stopped_early", False) == (end < STEPS)
    assert checkpoints(run.path)[-1] == end  # at_end is where it ends
    report = (run.path / "report.html").read_text()
    assert ("the run ended early: no evaluation has been" in report) == (end < STEPS)


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_run_that_is_broken_off_ends_at_the_same_step(tmp_path, at):
    values = config(tmp_path, SCORES, eval={"early_stop": {"metric": "score", "patience": 3}})
    values["checkpoint"] |= {"every_steps": 2, "keep_best": "score"}
    with pytest.raises(BrokenOffError):
        bigtrain.train(values, hooks=[break_off(at)])
    run = bigtrain.train(values)
    assert run.outcome.steps == 7
    assert result(run.path)["best"] == {"metric": "score", "value": 0.605, "step": 4, "since": 3}


def test_a_run_that_has_ended_goes_on_with_more_patience_alone(tmp_path):
    values = config(tmp_path, SCORES, eval={"early_stop": {"metric": "score", "patience": 3}})
    assert bigtrain.train(values).outcome.steps == 7
    with pytest.raises(RunFolderError, match="is finished") as caught:
        bigtrain.train(values)
    assert "give eval.early_stop more patience" in (caught.value.remedy or "")
    values["train"] = {"steps": STEPS - 1}  # less is asked for, and it is finished all the same
    with pytest.raises(RunFolderError, match="is finished"):
        bigtrain.train(values)
    values["eval"] |= {"early_stop": {"metric": "score", "patience": 5}}
    assert bigtrain.train(values).outcome.steps == 9
    values["eval"] |= {"early_stop": None}
    assert bigtrain.train(values).outcome.steps == STEPS - 1


@pytest.mark.parametrize("background", [True, False])
def test_the_best_checkpoint_stays_outside_of_keep(tmp_path, background):
    values = config(tmp_path, SCORES)
    values["checkpoint"] |= {"every_steps": 6, "keep_best": {"metric": "score"}, "background": background}
    run = bigtrain.train(values)
    assert checkpoints(run.path) == [4, 6, 12]  # 1 and 2 were the best once
    best = find_best(run.path / "checkpoints")
    assert best is not None
    with open_checkpoint(best) as reader:
        assert reader.extra["evaluation"]["score"] == 0.605
    shown = CliRunner().invoke(app, ["ckpt", "show", str(run.path), "--best"]).stdout
    assert "step-00000004" in shown
    assert "this one: score 0.605" in shown
    measured = CliRunner().invoke(app, ["eval", str(run.path), "--best", "--json"]).stdout
    assert json.loads(measured)["metrics"]["score"] == 0.605
    CliRunner().invoke(app, ["ckpt", "prune", str(run.path), "--keep", "2"])
    assert checkpoints(run.path) == [4, 6, 12]
    assert "the best: score 0.605" in (run.path / "report.html").read_text()


def test_where_the_best_checkpoint_is_gone_or_damaged_no_other_is_taken_for_it(tmp_path):
    values = config(tmp_path, SCORES)
    values["checkpoint"] |= {"every_steps": None, "keep": None, "keep_best": "score"}
    run = bigtrain.train(values)
    folder = run.path / "checkpoints"
    assert checkpoints(run.path) == [1, 2, 4, 12]
    (folder / "step-00000004" / "state.json").write_bytes(b"{}")
    assert best_of(run.path) == folder / "step-00000004"  # who opens it is told
    assert find_best(folder) == folder / "step-00000004"  # and it stays: it may be the disk that cannot be read now
    (folder / "step-00000004").rename(folder / "step-00000004.bad")
    with pytest.raises(CheckpointError, match="was that of step 4, which is not there"):
        best_of(run.path)
    assert find_best(folder) is None
    values = config(tmp_path / "other", SCORES)
    without = bigtrain.train(values)
    with pytest.raises(CheckpointError, match="known to be the best"):
        best_of(without.path)
    done = CliRunner().invoke(app, ["eval", str(without.path), "--best"])
    assert isinstance(done.exception, CheckpointError)


def test_what_is_not_measured_is_refused_before_anything_is_made(tmp_path):
    for changes, words in (
        ({"eval": {"early_stop": {"metric": "accuracy"}}}, "no number 'accuracy'"),
        ({"eval": {"early_stop": {"metric": "matrix", "mode": "max"}}}, "no number 'matrix'"),
        ({"checkpoint": {"keep_best": "f1"}}, "no number 'f1'"),
        ({"checkpoint": {"keep_best": "score"}, "data": {"eval": "none"}}, "no data to evaluate on"),
    ):
        with pytest.raises(UserError, match=words):
            bigtrain.train(config(tmp_path, SCORES, **changes))
    assert not (tmp_path / "runs").exists()


def test_a_metric_of_the_users_own_has_to_say_which_is_better(tmp_path):
    with pytest.raises(ConfigError, match="does not tell which is better"):
        bigtrain.train(config(tmp_path, SCORES, eval={"early_stop": "bleu"}))
    with pytest.raises(ConfigError, match="patience"):
        bigtrain.train(config(tmp_path, SCORES, eval={"early_stop": {"metric": "loss", "patience": 0}}))


def test_what_is_no_folder_is_not_called_a_run_without_a_best(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        best_of(tmp_path / "nowhere")
