"""Whole runs: from a mapping and objects of the user's own to the run folder, what is refused, how runs end early."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MetricCollection, R2Score
from typer.testing import CliRunner

import bigtrain
from bigtrain.cli import app
from bigtrain.errors import (
    BigtrainError,
    ConfigError,
    DataError,
    ModelError,
    OutOfMemoryError,
    PatternError,
    RunFolderError,
    TrainingError,
    UserError,
)
from bigtrain.progress import Hook, StepInfo
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.regression import Regression
from bigtrain.tracking.reading import read_rows
from launchers.follow import print_logs, standing

SAMPLES = 23


class Points:
    """Points and the numbers to be predicted for them."""

    def __init__(self, n: int = SAMPLES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(n, 3, generator=generator)
        self.targets = self.inputs.sum(1, keepdim=True) + 0.1 * torch.randn(n, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3) -> (B, 1)
        return self.head(torch.tanh(self.body(x)))


@pytest.fixture
def config(tmp_path):
    """A run file in words of its own, all in `tmp_path`."""
    return {
        "run": {"name": "mine", "dir": str(tmp_path / "runs"), "seed": 3},
        "data": {"batch_size": 8, "eval": {"split": 0.2}},
        "train": {"epochs": 2},
        "optim": {"lr": 0.01},
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none"},
    }


def train(config: dict[str, Any], overrides: tuple[str, ...] = (), **given: Any) -> bigtrain.Run:
    return bigtrain.train(config, overrides, **{"model": Net, "data": Points(), "task": Regression(), **given})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------- a whole run


def test_objects_of_the_users_own(config, tmp_path):
    run = train(config)
    assert run.path == tmp_path / "runs" / "mine"
    assert {"config.yaml", "metrics.jsonl", "result.json"} <= files(run.path).keys()
    # 23 samples: 5 are held out, 18 make 3 steps an epoch.
    assert (run.outcome.steps, run.outcome.samples, run.outcome.stopped) == (6, 36, False)
    assert run.evaluation.keys() == {"loss", "mse", "mae", "r2"}
    result = json.loads((run.path / "result.json").read_text())
    assert result == {
        "steps": 6,
        "samples": 36,
        "skipped_steps": 0,
        "engine": "single",
        "world_size": 1,
        "metrics": run.evaluation,
    }
    resolved = bigtrain.load_config(run.path / "config.yaml").config
    assert (resolved.model.name, resolved.data.name, resolved.task.name) == (
        "given:Net",
        "given:Points",
        "given:Regression",
    )


def test_the_history_is_what_happened_to_the_last_bit(config):
    told: list[tuple[int, float, float]] = []
    run = train(config, hooks=[lambda info: told.append((info.step, info.loss, info.grad_norm))])
    history = run.history()
    steps = [row for row in history if "loss" in row]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in steps] == told
    assert [row["epoch"] for row in steps] == [0, 0, 0, 1, 1, 1]
    evaluations = [row for row in history if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert {
        name.removeprefix("eval/"): value for name, value in evaluations[-1].items() if "/" in name
    } == run.evaluation


def test_the_training_is_plain_torchs(config):
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    data = Points()
    config |= {
        "data": {"batch_size": SAMPLES, "eval": "none"},
        "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 0.0},
    }
    run = train(config, ("train.steps=4", "optim.args.momentum=0.9"), model=model, data=data)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(plain(data.inputs), data.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert run.model is model
    assert run.evaluation == {}
    assert [row["loss"] for row in run.history()] == pytest.approx(losses, rel=1e-5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_everything(config):
    def losses(name: str, seed: int) -> list[float]:
        torch.manual_seed(time.time_ns() % 2**32)
        run = train(config, (f"run.name={name}", f"run.seed={seed}"))
        return [row["loss"] for row in run.history() if "loss" in row]

    assert losses("a", 1) == losses("b", 1)
    assert losses("c", 2) != losses("a-2", 1)


def test_data_of_its_own_to_evaluate_on(config):
    evaluated = Points(7, seed=1)
    run = train(config, ("train.epochs=1",), data=(Points(), evaluated))
    assert run.outcome.samples == SAMPLES  # nothing is held out
    with torch.no_grad():
        expected = F.mse_loss(run.model(evaluated.inputs), evaluated.targets)
    assert run.evaluation["mse"] == pytest.approx(expected.item(), rel=1e-6)
    run = train(config, ("run.name=none",), data=(Points(), None))
    assert run.evaluation == {}


RUN_FILE = """
run: {dir: "FOLDER/runs"}
task: classification
model: {name: bigmodel}
data: {name: digits, eval: none}
train: {steps: 3}
engine: {device: cpu}
track: {progress: none}
"""


def test_a_run_file_its_path_and_what_was_loaded_of_it(tmp_path):
    def small() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 10))

    file = tmp_path / "digits.yaml"
    file.write_text(RUN_FILE.replace("FOLDER", str(tmp_path)))
    run = bigtrain.train(file, ["train.steps=2"], model=small)
    assert (run.path, run.outcome.steps) == (tmp_path / "runs" / "digits", 2)
    loaded = bigtrain.load_config(file, ["run.name=loaded"])
    run = bigtrain.train(loaded, model=small)
    assert (run.path.name, run.outcome.steps) == ("loaded", 3)
    run = bigtrain.train(loaded.config, ["run.name=changed"], model=small)
    assert (run.path.name, run.outcome.steps) == ("changed", 3)


def test_a_run_may_stand_in_a_thread_of_a_notebook(config):
    handlers = signal.getsignal(signal.SIGINT)
    runs: list[bigtrain.Run] = []
    stop = Hook(lambda info: info.stop(), every=4)
    thread = threading.Thread(target=lambda: runs.append(train(config, hooks=[stop])))
    thread.start()
    thread.join()
    assert (runs[0].outcome.steps, runs[0].outcome.stopped) == (4, True)
    assert signal.getsignal(signal.SIGINT) is handlers


def test_what_a_run_sets_in_torch_is_put_back(config):
    threads = torch.get_num_threads()
    seen = []

    def look(info: StepInfo) -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))

    train(
        config,
        ("run.deterministic=true", f"run.threads={threads + 1}", "train.epochs=null", "train.steps=1"),
        hooks=[look],
    )
    assert seen == [(True, threads + 1)]
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == (False, threads)


def test_a_start_that_fails_leaves_no_thread_in_a_notebook(config):
    """The disk is full, say, when it is written what the run can be made again from."""
    folder = Path(config["run"]["dir"], "mine")
    (folder / "attempts").mkdir(parents=True)
    (folder / "repro").touch()
    with pytest.raises(OSError, match="repro"):
        train(config)
    names = {"console", "tracking"}
    assert not [thread for thread in threading.enumerate() if thread.name in names]


class PointsWithAGap(Points):
    """Its last sample cannot be read; the second step of the run would read it."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 17:
            raise OSError("gone")
        return super().__getitem__(index)


def test_a_users_error_after_the_start_is_a_failed_run(config):
    """Exit code 2 promises that nothing was created."""
    with pytest.raises(DataError, match="sample 17 cannot be read") as caught:
        train(config, ("data.batch_size=4",), data=(PointsWithAGap(), None))
    assert caught.value.exit_code == 1
    assert Path(config["run"]["dir"], "mine", "config.yaml").exists()


def test_a_module_that_was_cut_up_is_refused(config):
    net = Net()
    train(config, ("engine.name=fsdp", "train.epochs=1"), model=net)
    with pytest.raises(ModelError, match="cut up already"):
        train(config, ("run.name=again",), model=net)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss: loss.total / 8, "loss returned Tensor"),
        (lambda loss: loss._replace(total=loss.total.detach()), "does not depend on any parameter that is trained"),
        (lambda loss: loss._replace(total=loss.total.item()), "is a float, not a tensor"),
        (lambda loss: loss._replace(total=loss.preds), r"has the shape \(8, 1\)"),
    ],
)
@pytest.mark.parametrize("engine", ["single", "fsdp", "deepspeed"])
def test_a_loss_that_is_no_sum_is_told(config, change, said, engine):
    class Changed(Regression):
        def loss(self, model: nn.Module, batch: Batch) -> Any:
            return change(super().loss(model, batch))

    with pytest.raises(UserError, match=said):
        train(config, (f"engine={engine}",), task=Changed())


def test_an_override_alone_is_an_override(config):
    assert len([row for row in train(config, "train.epochs=1").history() if "eval/loss" in row]) == 1


def test_what_is_no_run_file_is_refused():
    for given in (None, [1], 3):
        with pytest.raises(ConfigError, match="described by a run file's path or by a mapping"):
            bigtrain.train(given, model=Net)  # type: ignore[arg-type]


def nothing(split: str) -> None:
    """A factory that forgets to return its dataset."""


class Tally:
    """Metrics with the two methods that are needed."""

    result: Any = MappingProxyType({"seen": 0.0})

    def update(self, result: LossSum, batch: Batch) -> None: ...

    def compute(self) -> Any:
        return self.result


class Unmeasured(Regression):
    """Measures with something else."""

    def __init__(self, metrics: Callable[[], Any] = Tally) -> None:
        self._metrics = metrics

    def metrics(self) -> Any:
        return self._metrics()


def test_a_hooks_own_numbers_are_in_the_next_line(config):
    """Also those of steps between two lines; of one name the last one counts."""
    run = train(
        config,
        ["track.log_every=2", "train.steps=6"],
        hooks=lambda info: info.log({"mine/step": torch.tensor(info.step), f"mine/{info.step % 2}": 0.5}),
    )
    rows = {row["step"]: {name: row[name] for name in row if name.startswith("mine/")} for row in run.history()}
    assert rows[4] == {"mine/step": 3.0, "mine/0": 0.5, "mine/1": 0.5}
    assert rows[2] == {"mine/step": 1.0, "mine/1": 0.5}
    assert bigtrain.load_run(run.path).metrics["mine/step"][1].tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"loss": 1.0}, "'loss' may not be logged"),
        ({"eval/mine": 1.0}, "'eval/mine' may not be logged"),
        ({"mine/it": "much"}, "mine/it is a str"),
        ({"mine/it": torch.ones(2)}, "mine/it is a Tensor"),
    ],
)
def test_what_a_hook_may_not_log(config, numbers, problem):
    with pytest.raises(TrainingError, match=re.escape(problem)):
        train(config, hooks=lambda info: info.log(numbers))


def test_a_hook_alone_is_a_hook(config):
    seen: list[int] = []
    train(config, hooks=Hook(lambda info: seen.append(info.step), every=2))
    assert seen == [2, 4, 6]


def test_metrics_need_two_methods(config):
    assert train(config, task=Unmeasured()).evaluation["seen"] == 0.0

    both = MetricCollection({"error": MeanAbsoluteError(), "of": R2Score()})
    for name, metric in (("both", both), ("one", MeanAbsoluteError())):
        numbers = train(config, (f"run.name={name}",), task=Unmeasured(lambda metric=metric: metric)).evaluation
        plain = train(config, (f"run.name={name}-plain",)).evaluation
        key = "error" if name == "both" else "mean_absolute_error"
        assert numbers[key] == pytest.approx(plain["mae"], rel=1e-6)

    class Bare(Tally):
        result = 0.5

    with pytest.raises(UserError, match=r"compute\(\) of the task's metrics gives a float"):
        train(config, ("run.name=bare",), task=Unmeasured(Bare))


def test_numbers_of_any_library_are_numbers(config):
    class OfMany(Tally):
        result = MappingProxyType(
            {
                "single": np.float32(0.5),
                "double": np.float64(0.25),  # what sklearn's scores are
                "whole": np.int64(3),
                "array": np.array(0.75),
                "tensor": torch.tensor([0.125]),
                "table": np.eye(2),
            }
        )

    run = train(config, task=Unmeasured(OfMany))
    wanted = {"single": 0.5, "double": 0.25, "whole": 3, "array": 0.75, "tensor": 0.125}
    assert {name: run.evaluation[name] for name in wanted} == wanted
    last = bigtrain.load_run(run.path).metrics.last()
    assert {name: last[f"eval/{name}"] for name in wanted} == wanted
    metrics = json.loads((run.path / "result.json").read_text())["metrics"]
    assert metrics == {"loss": run.evaluation["loss"], **wanted, "table": [[1.0, 0.0], [0.0, 1.0]]}


def test_a_job_that_never_began_is_not_one_that_broke_off(tmp_path):
    """It was cancelled while it waited: its folder is what was made when it was submitted."""
    (tmp_path / "it/attempts/0/submit").mkdir(parents=True)
    (tmp_path / "it/attempts/0/logs").mkdir()
    assert standing(tmp_path / "it").state == "not begun"
    shown = CliRunner().invoke(app, ["runs", "show", "it", f"--dir={tmp_path}"]).output
    assert shown.splitlines()[-1].split() == ["0", "not", "begun"]


def test_what_is_left_of_a_run_is_listed_and_shown(tmp_path):
    """As by every other command, which take a folder with a run file or numbers for a run."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.yaml").write_text("task: classification\n")
    for command in (["list"], ["show", "half"], ["logs", "half"]):
        shown = CliRunner().invoke(app, ["runs", *command, f"--dir={tmp_path}"])
        assert shown.exit_code == 0
        assert re.search("half.* not begun", shown.output)


def test_how_a_start_without_a_launcher_stands_and_what_it_said(config):
    """It leaves no start.json and no end.json."""
    running: list[Any] = []

    def broken(info: StepInfo) -> None:
        running.append(standing(Path(config["run"]["dir"], "mine")))
        raise KeyError("of a hook")

    with pytest.raises(KeyError):
        train(config, hooks=[Hook(broken, every=4)])
    path = Path(config["run"]["dir"], "mine")
    (found,) = running
    assert (found.state, found.where) == ("running", f"process {os.getpid()} on {socket.gethostname()}")
    assert time.time() - 60 < found.since < time.time()
    found = standing(path)
    assert (found.state, found.cause, found.step, found.code) == ("failed", "KeyError: 'of a hook'", 4, 1)
    said: list[str] = []
    print_logs(path, said.append)
    assert said[0].startswith("mine: given:Net (26 parameters)")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if "failure" not in line))
    assert standing(path).state == "broken off"
    train(config, ("run.name=stopped",), hooks=[lambda info: info.stop()])
    assert standing(path.with_name("stopped")).state == "stopped"
    train(config)
    assert standing(path).state == "finished"


def test_an_evaluation_that_is_not_finite_is_said_once(config):
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if self.training else math.nan)

    path = train(config, model=Broken, task=Unmeasured()).path
    events = [row for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "event" in row]
    said = [event["text"] for event in events if event["event"] == "warning"]
    assert said == ["the loss of the evaluation is not finite"]


@pytest.mark.parametrize("extra", [0, 1])
def test_a_warmup_that_the_run_does_not_outlast_is_said(config, extra):
    steps = read_rows(train(config).path)[-1]["step"]
    changes = (f"optim.schedule.warmup_steps={steps + extra}", "run.name=again")
    lines = (train(config, changes).path / "metrics.jsonl").read_text().splitlines()
    events = [row for row in map(json.loads, lines) if row.get("event") == "warning"]
    words = f"optim.schedule.warmup_steps is {steps + 1}, and the run has {steps} steps: it never reaches its full rate"
    assert [event["text"] for event in events] == [words] * extra


def test_two_engines_give_one_training(config):
    single = train(config, ("engine.name=single",))
    fsdp = train(config, ("engine.name=fsdp", "run.name=sharded"))
    assert json.loads((fsdp.path / "result.json").read_text())["engine"] == "fsdp"
    ours, theirs = ([row["loss"] for row in run.history() if "loss" in row] for run in (fsdp, single))
    assert ours == pytest.approx(theirs, rel=1e-6)


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_second_start_is_refused_and_touches_nothing(config):
    run = train(config)
    before = files(run.path)
    built: list[nn.Module] = []
    with pytest.raises(RunFolderError, match="the run mine is finished: steps 6") as caught:
        train(config, model=lambda: built.append(Net()))
    assert "run.name=mine-2" in caught.value.remedy
    assert not built  # which may take long
    assert files(run.path) == before


def test_a_run_that_was_stopped_is_not_finished(config):
    run = train(config, hooks=[lambda info: info.stop()])
    assert run.outcome.stopped
    assert not (run.path / "result.json").exists()
    before = files(run.path)
    with pytest.raises(RunFolderError, match="has begun and not finished"):
        train(config, ("checkpoint.resume=never",))
    assert files(run.path) == before


@pytest.mark.parametrize(
    ("given", "overrides", "error", "said"),
    [
        ({}, ["optim.lrr=1"], UserError, "optim.lrr"),
        ({"task": Classification()}, [], DataError, "labels are float32"),
        ({"model": lambda: nn.Linear(4, 1)}, [], DataError, "the model cannot take a batch"),
        ({"model": lambda: "a model"}, [], ModelError, "model() is str"),
        ({"model": "a model"}, [], ModelError, "model= is str"),
        ({"data": (Points(), Points(), Points())}, [], DataError, "a tuple of 3"),
        ({"data": {"train": Points(), "eval": Points()}}, [], DataError, "a dict of train, eval"),
        ({"data": DataLoader(Points())}, [], DataError, "a DataLoader"),
        ({"model": nn.Linear}, [], ModelError, "needs in_features, out_features"),
        ({"model": lambda: nn.LazyLinear(1)}, [], ModelError, "lazy modules"),
        ({"task": Unmeasured(dict)}, [], UserError, "gives a dict, which has no compute"),
        ({"hooks": [3]}, [], UserError, "a hook is a int"),
        ({"hooks": [Hook(print, every=0)]}, [], UserError, "every 0 steps"),
        ({"task": Regression}, [], UserError, "is a class"),
        ({"task": object()}, [], UserError, "no loss and no metrics"),
        ({}, ["finetune.freeze=[tail.*]"], PatternError, "'tail.*' matches no parameter"),
        ({}, ["optim.args.betas=[2, 0.9]"], UserError, "Invalid beta parameter"),
        ({"data": (Points(), [])}, [], DataError, "empty"),
        (
            {"data": None},
            ["data.name=tests.unit.test_running:nothing"],
            DataError,
            "test_running:nothing returned nothing",
        ),
    ],
)
def test_a_users_error_creates_nothing(config, tmp_path, given, overrides, error, said):
    with pytest.raises(error) as caught:
        train(config, tuple(overrides), **given)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- out of memory

HUGE = 2**50  # numbers: more than the addresses of a process reach


class Greedy(Regression):
    """Takes more memory than there is for more than so many samples."""

    def __init__(self, most: int) -> None:
        self.most = most

    def check(self, model: nn.Module, batch: Batch) -> None: ...

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        torch.empty(HUGE if len(batch) > self.most else 1)
        return super().loss(model, batch)


def ways(error: OutOfMemoryError) -> list[str]:
    head, *lines = error.remedy.splitlines()
    assert head == "change, in order of cost:"
    return [line.split(" (")[0] for line in lines]


def test_out_of_memory_says_what_to_change_and_that_helps(config):
    with pytest.raises(OutOfMemoryError) as caught:
        train(config, task=Greedy(4))
    assert "out of memory on cpu" in caught.value.problem
    assert str(4 * HUGE) in caught.value.problem  # what was asked for
    assert caught.value.where == "rank 0"
    assert caught.value.exit_code == 1
    assert ways(caught.value) == [
        "1. train.micro_batch_size=4",
        "2. engine.name=fsdp on more processes",
        "3. optim.name=sgd",
        "4. a smaller model, or a shorter context",
    ]
    assert train(config, ("train.micro_batch_size=4", "run.name=smaller"), task=Greedy(4)).outcome.steps == 6


@pytest.fixture
def group_of_one():
    """What fsdp needs in one process; a run that fails leaves a group of its own open."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_only_ways_that_are_left_are_told(config):
    changes = ("train.micro_batch_size=1", "engine.name=fsdp", "optim.name=sgd")
    with pytest.raises(OutOfMemoryError) as caught:
        train(config, changes, task=Greedy(0))
    assert ways(caught.value) == ["1. a smaller model, or a shorter context"]


def make_huge_model() -> nn.Module:
    return nn.Linear(2**25, 2**25)


class HugeLayer(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.empty(HUGE).sum()


class HugeArray(Points):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        np.empty(HUGE)
        return super().__getitem__(index)


@pytest.mark.parametrize("given", [{"model": make_huge_model}, {"model": HugeLayer}, {"data": HugeArray()}])
def test_memory_may_run_out_before_the_first_step(config, tmp_path, given):
    """In a model's constructor, in its first forward pass (that of the task's check), and in the data."""
    with pytest.raises(OutOfMemoryError) as caught:
        train(config, **given)
    assert len(ways(caught.value)) == 4
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(config):
    class Odd(Greedy):
        def loss(self, model: nn.Module, batch: Batch) -> LossSum:
            raise RuntimeError("an error of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own") as caught:
        train(config, task=Odd(0))
    assert not isinstance(caught.value, BigtrainError)


# ---------------------------------------------------------------------------------------------------------- signals

MODULE = """
import torch
from torch import nn

def model():
    return nn.Linear(3, 1)

def points(split):
    inputs = torch.arange(60.0).reshape(20, 3) / 60
    return [(row, row.sum(0, keepdim=True)) for row in inputs]
"""

ENDLESS = """
run: {name: interrupted, dir: runs}
task: regression
model: mine:model
data: {name: "mine:points", batch_size: 4, eval: {split: 0.2}}
train: {steps: 100000000}
engine: {device: cpu}
eval: {every_epochs: null}
track: {log_every: 1, progress: plain}
"""


@pytest.fixture
def interruptible(tmp_path):
    """A run of the command in a process of its own, in the middle of its steps; and its folder."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(ENDLESS)
    source = str(Path(bigtrain.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "bigtrain", "train", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = tmp_path / "runs" / "interrupted"
    try:
        wait_for_steps(process, folder / "metrics.jsonl")
        yield process, folder
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_steps(process: subprocess.Popen[str], metrics: Path) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_output_that_has_gone_does_not_end_a_training(interruptible):
    process, folder = interruptible
    process.stdout.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)  # a line is printed every two seconds
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 130
    assert (folder / "checkpoints").is_dir()
    assert "failure" not in (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_training_without_any_output(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(ENDLESS.replace("100000000", "2"))
    environment = os.environ | {"PYTHONPATH": str(Path(bigtrain.__file__).parents[1])}
    command = ["sh", "-c", f"{sys.executable} -m bigtrain train run.yaml >&- 2>&-"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert json.loads((tmp_path / "runs/interrupted/result.json").read_text())["steps"] == 2


def test_an_interrupt_stops_at_a_step_boundary(interruptible):
    process, folder = interruptible
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    steps = [row["step"] for row in read_rows(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    said = (
        f"stopped after step {steps[-1]} of 100000000, as asked: runs/interrupted; the same command goes on from there"
    )
    assert output.splitlines()[-1] == said
    assert "Traceback" not in output
    assert not (folder / "result.json").exists()
