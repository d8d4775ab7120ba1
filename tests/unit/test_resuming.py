"""A run that is broken off goes on as if it had not been, to the last bit; what has changed is told, or refused."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain.checkpoint import diff, find, open_checkpoint, verify
from bigtrain.checkpoint.background import _Prepared
from bigtrain.doors.exporting import export
from bigtrain.doors.incoming import bring_in
from bigtrain.errors import DiskFullError, NoGoodError, NonFiniteError, RunFolderError, StateError
from tests.helpers.faulty import before_file_operations
from tests.helpers.resuming import STEPS, BrokenOffError, Trace, break_off, config, losses, one_thread, stop


@pytest.fixture(autouse=True)
def _in_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trace = Trace()
    with one_thread():
        run = bigtrain.train(config(folder), hooks=[trace])
    return run.path, trace


def final(path: Path) -> Path:
    return find(path / "checkpoints")[0]


def assert_as_unbroken(run, trace, unbroken):
    path, expected = unbroken
    assert trace.steps == expected.steps
    assert losses(run) == losses(path)
    assert diff(final(run.path), final(path)).differences == ()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 5, 7, 11])
def test_a_run_that_dies_goes_on_to_the_last_bit(tmp_path, unbroken, at, workers):
    values = config(tmp_path)
    values["data"]["workers"] = workers
    trace = Trace()
    with pytest.raises(BrokenOffError):
        bigtrain.train(values, hooks=[trace, break_off(at)])
    run = bigtrain.train(values, hooks=[trace])
    assert_as_unbroken(run, trace, unbroken)


@pytest.mark.parametrize("at", range(1, STEPS))
def test_a_run_that_is_stopped_goes_on_to_the_last_bit(tmp_path, unbroken, at):
    trace = Trace()
    run = bigtrain.train(config(tmp_path), hooks=[trace, stop(at)])
    assert run.outcome.stopped
    assert find(run.path / "checkpoints")[0].name == f"step-{at:08d}"
    assert_as_unbroken(bigtrain.train(config(tmp_path), hooks=[trace]), trace, unbroken)


def test_five_stops_within_a_run(tmp_path, unbroken):
    trace = Trace()
    for at in (1, 2, 3, 6, STEPS - 1):
        bigtrain.train(config(tmp_path), hooks=[trace, stop(at)])
    run = bigtrain.train(config(tmp_path), hooks=[trace])
    assert_as_unbroken(run, trace, unbroken)
    assert sorted(entry.name for entry in (run.path / "attempts").iterdir()) == list("012345")


def test_written_in_the_foreground_it_is_the_same(tmp_path, unbroken):
    values = config(tmp_path, checkpoint={"every_steps": 5, "background": False})
    trace = Trace()
    with pytest.raises(BrokenOffError):
        bigtrain.train(values, hooks=[trace, break_off(8)])
    assert_as_unbroken(bigtrain.train(values, hooks=[trace]), trace, unbroken)


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, unbroken, caplog):
    trace = Trace()
    bigtrain.train(config(tmp_path), hooks=[trace, stop(7)])
    newest = find(tmp_path / "runs" / "run" / "checkpoints")[0]
    shard = newest / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with caplog.at_level(logging.WARNING, logger="bigtrain"):
        run = bigtrain.train(config(tmp_path), hooks=[trace])
    assert "step-00000007 is damaged; going on from step-00000005 instead" in caplog.text
    assert str(newest) in caplog.text
    assert f"{newest.name}/{shard.name} is damaged" in caplog.text
    assert_as_unbroken(run, trace, unbroken)
    assert (newest.parent / "step-00000007.bad").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    bigtrain.train(config(tmp_path), hooks=[stop(7)])
    folder = tmp_path / "runs" / "run" / "checkpoints"
    for path in find(folder):
        (path / "manifest.json").write_text("{}")
    before = sorted(folder.iterdir())
    with pytest.raises(NoGoodError) as caught:
        bigtrain.train(config(tmp_path))
    assert all(str(path) in str(caught.value) for path in before)
    assert sorted(folder.iterdir()) == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, unbroken):
    trace = Trace()
    with pytest.raises(BrokenOffError):
        bigtrain.train(config(tmp_path), hooks=[trace, break_off(2)])
    assert find(tmp_path / "runs" / "run" / "checkpoints") == []
    assert_as_unbroken(bigtrain.train(config(tmp_path), hooks=[trace]), trace, unbroken)


def test_a_finished_run_goes_on_when_more_is_asked_for(tmp_path):
    constant = config(tmp_path, optim={"lr": 0.01})
    whole = bigtrain.train(constant, ["run.name=whole"])
    bigtrain.train(constant, ["train.steps=4"])
    with pytest.raises(RunFolderError, match="is finished: steps 4") as caught:
        bigtrain.train(constant, ["train.steps=3"])
    assert "raise train.steps" in caught.value.remedy
    run = bigtrain.train(constant)
    assert losses(run) == losses(whole)
    assert json.loads((run.path / "result.json").read_text())["steps"] == STEPS
    assert json.loads((run.path / "attempts" / "1" / "earlier-result.json").read_text())["steps"] == 4


def test_epochs_end_where_they_would_after_a_change_of_the_batch(tmp_path):
    values = config(tmp_path, train={"epochs": 3})
    bigtrain.train(values, hooks=[stop(4)])  # one step into the second epoch
    seen = []
    bigtrain.train(values, ["data.batch_size=2"], hooks=[lambda info: seen.append((info.epoch, info.num_samples))])
    assert seen == [(1, 2)] * 3 + [(1, 1)] + [(2, 2)] * 5 + [(2, 1)]  # 7 samples of an epoch of 11, then 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.seed=4", "run.seed was 3 and is 4"),
        ("model.args.dropout=0.2", "model.args.dropout was 0.1 and is 0.2"),
        ("optim.name=sgd", "optim.name was 'adamw' and is 'sgd'"),
        ("data.args.context=3", "fingerprint has changed"),
        ("precision=fp64", "precision was fp32 and is fp64"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_and_changes_nothing(tmp_path, change, said):
    bigtrain.train(config(tmp_path), hooks=[stop(7)])
    path = tmp_path / "runs" / "run"
    before = sorted(path.rglob("*"))
    with pytest.raises(RunFolderError) as caught:
        bigtrain.train(config(tmp_path), [change])
    assert said in str(caught.value)
    assert sorted(path.rglob("*")) == before


def test_data_that_have_changed_are_refused(tmp_path):
    bigtrain.train(config(tmp_path), hooks=[stop(7)])
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("fox", "cat"))
    with pytest.raises(RunFolderError, match="the data are not those that the run has been trained on"):
        bigtrain.train(config(tmp_path))


def test_another_model_under_the_same_name_is_listed_whole(tmp_path):
    """The run file says the same, and the factory's code has changed."""
    made = {"width": 5}

    def factory():
        return torch.nn.Sequential(torch.nn.Linear(3, made["width"]), torch.nn.Linear(made["width"], 1))

    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    values = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "task": "regression",
        "data": {"name": "x", "batch_size": 4, "eval": "none"},
        "train": {"steps": 4},
        "engine": {"device": "cpu"},
        "track": {"progress": "none"},
    }
    bigtrain.train(values, model=factory, data=data, hooks=[stop(2)])
    made["width"] = 6
    with pytest.raises(StateError) as caught:
        bigtrain.train(values, model=factory, data=data)
    for name in ("0.weight", "0.bias", "1.weight"):
        assert f"different: weight {name}" in str(caught.value)


def test_a_changed_rate_is_told_and_used(tmp_path, capsys):
    bigtrain.train(config(tmp_path), hooks=[stop(7)])
    rates = []
    bigtrain.train(
        config(tmp_path),
        ["optim.lr=0.02", "optim.schedule=constant", "track.progress=plain"],
        hooks=[lambda info: rates.append(info.lr)],
    )
    said = capsys.readouterr().out
    assert "going on from step 7, saved by single on 1 process" in said
    assert "changed: optim.lr was 0.01 and is 0.02" in said
    assert all(sorted(set(lr)) == [0.003, 0.02] for lr in rates)


def test_hooks_can_ask_for_a_checkpoint(tmp_path):
    run = bigtrain.train(
        config(tmp_path, checkpoint={"every_steps": None, "at_end": False}),
        hooks=[lambda info: info.save() if info.step in (3, 8) else None],
    )
    assert [path.name for path in find(run.path / "checkpoints")] == ["step-00000008", "step-00000003"]


def test_by_the_clock(tmp_path):
    run = bigtrain.train(config(tmp_path, checkpoint={"every_steps": None, "every_minutes": 1e-6, "keep": None}))
    assert len(find(run.path / "checkpoints")) == STEPS


def test_retention(tmp_path):
    policy = {"every_steps": 1, "keep": 1, "keep_every": 4}
    run = bigtrain.train(config(tmp_path, checkpoint=policy))
    steps = [int(path.name[-8:]) for path in find(run.path / "checkpoints")]
    assert steps == [12, 11, 8, 4]  # the newest two whatever keep says
    assert all(verify(path).is_good for path in find(run.path / "checkpoints"))


def test_no_checkpoint_of_a_step_that_is_not_finite(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))

    def spoil(info):
        if info.step == 5:
            data.tensors[0].fill_(float("nan"))

    values = config(tmp_path, task="regression", finetune={}, checkpoint={"every_steps": 1, "keep": None})
    values |= {"data": {"name": "x", "batch_size": 4, "eval": "none"}, "optim": {"lr": 0.01}}
    del values["model"]
    with pytest.raises(NonFiniteError, match="in step 6"):
        bigtrain.train(values, model=lambda: torch.nn.Linear(3, 1), data=data, hooks=[spoil])
    newest = find(tmp_path / "runs" / "run" / "checkpoints")[0]
    assert newest.name == "step-00000005"
    assert verify(newest).is_good


def test_an_epoch_is_ended_whole_where_the_new_batch_does_not_divide_what_was_consumed(tmp_path):
    values = config(tmp_path, train={"epochs": 2})
    bigtrain.train(values, hooks=[stop(2)])  # 8 of 11 samples
    seen = []
    bigtrain.train(values, ["data.batch_size=7"], hooks=[lambda info: seen.append((info.epoch, info.num_samples))])
    assert seen == [(0, 3), (1, 7), (1, 4)]


def evaluated(tmp_path: Path, **changes: object) -> dict:
    values = config(tmp_path, **changes)
    values["data"]["eval"] = {"split": 0.3}
    return values


def test_a_run_that_has_done_more_than_is_asked_for_now_tells_what_it_has_come_to(tmp_path):
    whole = bigtrain.train(evaluated(tmp_path), ["run.name=whole", "train.steps=7", "optim.schedule=constant"])
    bigtrain.train(evaluated(tmp_path), ["optim.schedule=constant", "eval.every_epochs=null"], hooks=[stop(7)])
    run = bigtrain.train(evaluated(tmp_path), ["train.steps=6", "optim.schedule=constant", "eval.every_epochs=null"])
    result = json.loads((run.path / "result.json").read_text())
    assert result["steps"] == 7
    assert result["metrics"]["loss"] == whole.evaluation["loss"]


def test_killed_after_the_last_save_it_ends_as_it_would_have(tmp_path):
    values = evaluated(tmp_path, train={"epochs": 2})
    run = bigtrain.train(values)
    ended, result = run.history()[-1], (run.path / "result.json").read_text()
    (run.path / "result.json").unlink()
    again = bigtrain.train(values)
    told = again.history()[-1]
    assert {**told, "time": 0} == {**ended, "time": 0}
    assert (run.path / "result.json").read_text() == result


def test_a_stop_in_the_last_step_is_the_end(tmp_path):
    run = bigtrain.train(config(tmp_path), hooks=[stop(STEPS)])
    assert not run.outcome.stopped
    assert json.loads((run.path / "result.json").read_text())["steps"] == STEPS


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_anew(tmp_path, capsys):
    run = bigtrain.train(config(tmp_path), hooks=[stop(7)])
    shutil.rmtree(run.path / "checkpoints")
    bigtrain.train(config(tmp_path), ["track.progress=plain"])
    assert "this run has begun before, and left no checkpoint in" in capsys.readouterr().out


def test_a_checkpoint_that_was_brought_in_is_no_run_to_go_on_with(tmp_path):
    run = bigtrain.train(config(tmp_path), hooks=[stop(3)])
    with open_checkpoint(find(run.path / "checkpoints")[0]) as reader:
        export(reader, tmp_path / "w.safetensors", "safetensors")
    shutil.rmtree(run.path / "checkpoints")
    bring_in(tmp_path / "w.safetensors", run.path / "checkpoints", "safetensors")
    with pytest.raises(RunFolderError, match=r"was brought in(.|\n)*init_from"):
        bigtrain.train(config(tmp_path))


def test_what_bigtrain_exported_goes_on_when_it_is_brought_back(tmp_path, capsys):
    values = config(tmp_path)
    values["model"]["args"]["dropout"] = 0.0
    whole = bigtrain.train(values, ["run.name=whole"])
    run = bigtrain.train(values, hooks=[stop(5)])
    with open_checkpoint(find(run.path / "checkpoints")[0]) as reader:
        export(reader, tmp_path / "all.pt", "torch")
    shutil.rmtree(run.path / "checkpoints")
    bring_in(tmp_path / "all.pt", run.path / "checkpoints", "torch")
    # Elsewhere, there is nothing of the run but what was brought.
    elsewhere = bring_in(tmp_path / "all.pt", run.path.with_name("elsewhere") / "checkpoints", "torch").parents[1]
    with pytest.raises(RunFolderError, match="has begun and not finished"):
        bigtrain.train(values, ["run.name=elsewhere", "checkpoint.resume=never"])
    run = bigtrain.train(values, ["track.progress=plain"])
    assert "the checkpoint was brought in: random numbers (dropout's) are drawn anew" in capsys.readouterr().out
    assert losses(run) == losses(whole)
    assert bigtrain.train(values, ["run.name=elsewhere"]).path == elsewhere
    assert losses(elsewhere) == [row for row in losses(whole) if row[0] > 5]


def test_arguments_that_ask_for_a_state_that_was_never_kept_are_refused(tmp_path):
    bigtrain.train(config(tmp_path), hooks=[stop(3)])
    with pytest.raises(RunFolderError, match="needs max_exp_avg_sq now, which it never kept"):
        bigtrain.train(config(tmp_path), ["optim.args.amsgrad=true"])
    changed = bigtrain.train(config(tmp_path), ["optim.args.betas=[0.8,0.9]"], hooks=[stop(5)])
    assert changed.outcome.steps == 5


def test_momentum_may_begin_later(tmp_path):
    values = config(tmp_path, optim={"name": "sgd", "lr": 0.01})
    bigtrain.train(values, hooks=[stop(3)])
    assert bigtrain.train(values, ["optim.args.momentum=0.9"]).outcome.steps == STEPS


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("at", [7, STEPS])
def test_a_run_whose_last_checkpoint_does_not_fit_is_not_done(tmp_path, background, at):
    """Whatever on_full says: it has nothing to continue with."""

    def full(operation: str, path: Path) -> None:
        if f"step-{at:08d}" in str(path):
            raise OSError(errno.ENOSPC, "no space")

    policy = {"every_steps": 4, "on_full": "continue", "background": background}
    with before_file_operations(full), pytest.raises(DiskFullError, match="no room for the last checkpoint"):
        bigtrain.train(config(tmp_path, checkpoint=policy), hooks=[stop(at)])
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
    assert bigtrain.train(config(tmp_path, checkpoint=policy)).outcome.steps == STEPS


def test_a_checkpoint_that_somebody_moves_away_does_not_stop_the_run(tmp_path, caplog):
    folder = tmp_path / "runs" / "run" / "checkpoints"

    def move(operation: str, path: Path) -> None:
        done = folder / "step-00000004"
        if operation == "list" and done.exists():  # as it prunes, after the commit
            done.rename(tmp_path / "moved")

    with before_file_operations(move):
        run = bigtrain.train(config(tmp_path, checkpoint={"every_steps": 4}))
    assert run.outcome.steps == STEPS
    assert "is not there any more" in caplog.text


def test_a_checkpoint_that_failed_does_not_take_the_next_one_with_it(tmp_path):
    """The disk was full for one of them, and that is heard when the next is due."""
    is_due = threading.Event()

    def full(operation: str, path: Path) -> None:
        if operation == "sync" and "step-00000004" in str(path):
            is_due.wait(60)
            time.sleep(0.3)  # until the loop waits for it
            raise OSError(errno.ENOSPC, "no space")

    policy = {"every_steps": 1, "keep": None, "on_full": "continue"}
    values = config(tmp_path, checkpoint=policy)
    with before_file_operations(full):
        run = bigtrain.train(values, hooks=[lambda info: is_due.set() if info.step == 5 else None])
    saved = {int(path.name[-8:]) for path in find(run.path / "checkpoints")}
    assert saved == set(range(1, STEPS + 1)) - {4}
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("event") == "checkpoint"] == sorted(saved)


def test_the_optimizer_waits_for_a_copy_that_is_slow(tmp_path, monkeypatch):
    copy_rest = _Prepared.copy_rest

    def slow(prepared):
        time.sleep(0.2)
        copy_rest(prepared)

    monkeypatch.setattr(_Prepared, "copy_rest", slow)
    values = config(tmp_path)
    values["checkpoint"] |= {"every_steps": 3, "keep": None}
    run = bigtrain.train(values)
    values["run"]["name"] = "waits"
    values["checkpoint"]["background"] = False
    plain = bigtrain.train(values)
    steps = find(run.path / "checkpoints")
    assert len(steps) > 2
    for ours, theirs in zip(steps, find(plain.path / "checkpoints"), strict=True):
        assert diff(ours, theirs).differences == ()
