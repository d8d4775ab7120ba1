"""A signal before the first step ends a training with a word, and leaves nothing that is not said."""

import json
import signal
import sys
from pathlib import Path

import pytest
import typer

import bigtrain
from bigtrain.cli.train import train
from bigtrain.early import StoppedEarly
from bigtrain.tracking.reading import load_run, read_rows

MODULE = """
import os, signal
import torch
from torch import nn


def model(number: int = 0, hides: bool = False):
    try:
        if number:
            os.kill(os.getpid(), number)
    except BaseException:
        if not hides:
            raise
    return nn.Linear(1, 1)


class Interrupted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 6:
            if not self.signals:
                raise KeyboardInterrupt
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().forward(x)


def interrupted(signals: tuple = ()):
    model = Interrupted(1, 1)
    model.signals = signals
    return model


def points(split):
    return [(torch.tensor([float(i)]), torch.tensor([float(i)])) for i in range(8)]
"""

RUN = """
run: {name: it, dir: RUNS}
task: regression
model: stopped_early:model
data: {name: "stopped_early:points", batch_size: 4, eval: {split: 0.5}}
train: {steps: 2}
engine: {device: cpu}
track: {wandb: disabled, tensorboard: false, report: false}
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch) -> Path:
    (tmp_path / "stopped_early.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("RUNS", str(tmp_path / "runs")))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_says_that_nothing_was_saved(run_file, number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(StoppedEarly) as ended:
        train(run_file, [f"model.args.number={int(number)}"])
    assert ended.value.code == 128 + number
    assert capsys.readouterr().out == "stopped before its first step: nothing was saved; the same command begins it\n"
    assert not (run_file.parent / "runs").exists()
    assert signal.getsignal(number) is before


def test_one_that_was_kept_from_us_ends_it_when_the_steps_begin(run_file, capsys):
    changes = [f"model.args.number={int(signal.SIGTERM)}", "model.args.hides=true", "checkpoint.resume=never"]
    with pytest.raises(StoppedEarly):
        train(run_file, changes)
    folder = run_file.parent / "runs/it"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped before its first step: nothing was saved; delete {folder}, and the same command begins it"
    )
    assert read_rows(folder) == []
    told = [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert told == ["start", "stop"]


def test_a_run_that_goes_on_says_from_where(run_file, capsys):
    train(run_file, [])
    capsys.readouterr()
    with pytest.raises(StoppedEarly):
        train(run_file, ["train.steps=4", f"model.args.number={int(signal.SIGTERM)}"])
    said = "stopped before another step; the same command goes on from step 2\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("resume", "way"), [("auto", "the same command goes on"), ("never", "with checkpoint.resume=auto it goes on")]
)
def test_what_goes_on_is_said_as_the_run_file_lets_it(run_file, resume, way, capsys):
    bigtrain.train(run_file, [f"checkpoint.resume={resume}"], hooks=lambda info: info.stop())
    assert (
        f"stopped after step 1 of 2, as asked: {run_file.parent}/runs/it; {way} from there" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("4", "ended at once, saving nothing more; the same command goes on from step 4\n"),
        ("null", "ended at once: nothing was saved; the same command begins it\n"),
    ],
)
@pytest.mark.parametrize(
    ("signals", "code"),
    [([], 130), ([signal.SIGTERM] * 2, 143), ([signal.SIGTERM, signal.SIGINT], 130), ([signal.SIGHUP] * 2, 129)],
)
def test_a_second_wish_says_what_there_is(run_file, every, said, signals, code, capsys, monkeypatch):
    monkeypatch.setattr("bigtrain.early._SAME_WISH_S", 0.0)
    assert _ends(run_file, every, signals, monkeypatch) == code
    assert capsys.readouterr().out.endswith(said)
    assert load_run(run_file.parent / "runs/it").events[-1]["event"] == "stop"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_wish_that_is_told_twice_is_one(run_file, number, capsys, monkeypatch):
    """As of a terminal that is closed: by its shell, and by the system."""
    assert _ends(run_file, "4", [number, number], monkeypatch) == 130
    assert "of 9, as asked" in capsys.readouterr().out


def _ends(run_file, every, signals, monkeypatch):
    """The exit code of a run that gets these signals in its sixth step."""
    monkeypatch.setitem(train.__globals__, "leave", sys.exit)  # this process is to go on
    model = f"model={{name: stopped_early:interrupted, args: {{signals: {[int(number) for number in signals]}}}}}"
    changes = [model, "train.steps=9", f"checkpoint.every_steps={every}"]
    with pytest.raises((SystemExit, typer.Exit)) as ended:
        train(run_file, [*changes, "checkpoint.background=false", "eval.every_epochs=null"])
    return getattr(ended.value, "exit_code", None) or ended.value.code


def test_a_wish_after_the_end_says_that_the_run_is_finished(run_file, capsys, monkeypatch):
    monkeypatch.setitem(train.__globals__, "leave", sys.exit)
    monkeypatch.setattr("bigtrain.telling.write_report", lambda path: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(run_file, ["track.report=true"])
    assert ended.value.code == 143
    folder = run_file.parent / "runs/it"
    assert capsys.readouterr().out.endswith(f"ended at once; the run is finished: {folder}\n")
    assert (folder / "result.json").exists()
