"""`bigtrain parity` says "the same" of engines that are right, and finds every fault that is planted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bigtrain import parity
from bigtrain.config.loader import from_dict
from bigtrain.config.schema import Config
from bigtrain.errors import CombinationError, DataError, RankError
from bigtrain.parity import Verdict
from tests.helpers import faults, zoo


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 19), nn.GELU(), nn.Dropout(0.2), nn.Linear(19, 16))


class Small(nn.Module):
    """Norms, dropout, a bias before a norm whose true gradient is not zero, and a layer that a run can freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:  # (B, 12) -> (B, 5)
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class WithBatchNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))


class Restless(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.new_empty(1).normal_()


class Centred(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Tracking(Small):
    """Like an InstanceNorm with running statistics: evaluation alone would differ."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return super().forward(x)
        return super().forward(x - self.mean)


class Sample(NamedTuple):
    inputs: Tensor
    label: int


class OfMyOwn:
    """Named tuples in float64."""

    def __init__(self, split: str) -> None:
        self.inputs = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.inputs[index], index % 5)


class WithSpare(Small):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16)


def config(model: str = "Small", **changes: Any) -> Config:
    """Clipping bites, decay matters, the rate changes every step, and the last step of an epoch is short."""
    run = {
        "task": "classification",
        "model": f"{__name__}:{model}",
        "data": {
            "name": "synthetic",
            "args": {"kind": "classification", "samples": 100, "shape": [12], "classes": 5},
            "eval": "none",
            "batch_size": 16,
        },
        "train": {"epochs": 3},
        "optim": {
            "lr": 3e-3,
            "clip_grad_norm": 0.5,
            "groups": [{"match": "head.*", "lr": 1e-2}],
            "schedule": {"name": "cosine", "warmup_steps": 4},
        },
        "finetune": {"freeze": ["layers.0.*"]},
    }
    return from_dict({**run, **changes}).config


@pytest.mark.slow
def test_engines_are_the_same() -> None:
    names = ["single", "ddp", "fsdp"]
    report = parity.run(config(), steps=10, engines=names, compiles=False)
    assert [verdict.outcome for verdict in report.verdicts] == ["same"] * 45
    assert report.exit_code == 0
    variants = {str(verdict.variant) for verdict in report.verdicts}
    assert variants >= {"fsdp × 2, accumulation 2, fp64", "single × 1, accumulation 1, fp32"}
    assert report.switched_off == ["Dropout (3 of them)"]
    assert all(verdict.horizon >= 5 for verdict in report.verdicts)


FAULTS = {
    "gradients off by 1 %": (faults.gradients_off_by_one_percent, "gradient norm"),
    "a dropped microbatch": (faults.dropped_microbatch, "loss"),
    "clipping per rank": (faults.clipping_per_rank, "parameters"),
    "decay on norms": (faults.decay_on_norms, "parameters"),
    "two swapped samples": (faults.two_swapped_samples, "loss"),
    "a frozen parameter that moves": (faults.frozen_parameter_that_moves, "frozen parameter"),
    "a learning rate off by one step": (faults.learning_rate_off_by_one_step, "parameters"),
}


def measured_with(fault: Any, engine: str, precision: str) -> Verdict:
    """The verdict on an engine in two processes with a fault planted."""
    report = parity.run(
        config(),
        steps=8,
        engines=[engine],
        world_sizes=[2],
        accumulations=[2],
        precisions=[precision],
        compiles=False,
        tamper=fault,
    )
    assert report.exit_code == (1 if report.verdicts[0].outcome == "differs" else 0)
    return report.verdicts[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_finds_a_planted_fault(name: str) -> None:
    fault, first_sign = FAULTS[name]
    verdict = measured_with(fault, "fsdp", "fp64")
    assert verdict.outcome == "differs"
    assert verdict.failed_at in (1, 2)
    assert verdict.failed_what == first_sign
    assert verdict.worst


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_finds_a_planted_fault_in_deepspeed(name: str) -> None:
    fault, _ = {**FAULTS, "clipping per rank": (faults.clipping_per_rank_in_deepspeed, "")}[name]
    assert measured_with(fault, "deepspeed:2", "fp32").outcome == "differs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "fsdp") for name in FAULTS if name != "decay on norms"),  # which is less than bf16 rounds
        *(("gradients off by 1 %", engine) for engine in ("ddp", "deepspeed:2", "deepspeed:3")),
        *(("a frozen parameter that moves", engine) for engine in ("ddp", "deepspeed:2", "deepspeed:3")),
    ],
)
def test_finds_a_planted_fault_in_bf16(name: str, engine: str) -> None:
    verdict = measured_with(FAULTS[name][0], engine, "bf16")
    assert verdict.outcome == "differs"
    if name == "gradients off by 1 %":
        assert (verdict.failed_at, verdict.failed_what) == (1, "gradient norm")


def test_a_users_own_samples_spare_layer_optimizer_and_data_workers() -> None:
    data = {"name": f"{__name__}:OfMyOwn", "eval": "none", "batch_size": 8, "workers": 1}
    varied = config("WithSpare", data=data, optim=zoo.NORMALISED)
    report = parity.run(
        varied, steps=6, engines=["fsdp"], world_sizes=[2], accumulations=[2], precisions=["fp32"], compiles=False
    )
    assert {verdict.outcome for verdict in report.verdicts} == {"same"}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("WithBatchNorm", "BatchNorm normalises"),
        ("Restless", "random in training"),
        ("Centred", "the loss of a sample depends on which samples are in its batch"),
        ("Tracking", "the buffer mean depends on which samples are in its batch"),
    ],
)
def test_refuses_what_differs_by_nature(model: str, problem: str) -> None:
    with pytest.raises(CombinationError, match=problem):
        parity.run(config(model, finetune={}, optim={}), steps=2, engines=["ddp"], world_sizes=[2])


def test_data_that_the_model_cannot_take_are_refused_as_by_train() -> None:
    wide = {"name": "synthetic", "args": {"kind": "classification", "shape": [13]}, "eval": "none", "batch_size": 16}
    with pytest.raises(DataError, match="cannot take a batch of the data"):
        parity.run(config(data=wide), steps=2, engines=["single"], world_sizes=[1])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_moments_in_bf16_are_those_of_the_plain_loop(name: str) -> None:
    optim = {"name": name, "lr": 3e-3, "moments": "bf16", "args": {"betas": [0.9, 0.95]}}
    report = parity.run(
        config(optim=optim), steps=10, engines=["single", "fsdp"], precisions=["fp64"], compiles=False
    )
    assert {verdict.outcome for verdict in report.verdicts} == {"same"}


def test_says_so_when_rounding_alone_differs_too_soon() -> None:
    """A rate so large that training is chaotic at once: no verdict, exit code 3."""
    wild = config(optim={"name": "sgd", "lr": 1e4, "clip_grad_norm": None}, finetune={})
    report = parity.run(wild, steps=8, engines=["single"], world_sizes=[1], accumulations=[2], precisions=["fp32"])
    assert report.exit_code == 3
    assert report.verdicts[0].outcome == "inconclusive"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "options", "count"),
    [
        ("quickstart", [], ["--engines=ddp,fsdp,deepspeed:3", "--precisions=fp32,bf16", "--no-compile"], 12),  # it has no blocks to compute again
        (
            "gpt",
            ["model.args.layers=2", "model.args.width=64", "data.args.context=32", "data.batch_size=4"],
            ["--engines=fsdp,deepspeed:3", "--precisions=fp32", "--compile"],
            8,
        ),
        (
            "resnet_digits",
            ["data.batch_size=4", "data.args.size=16"],
            ["--engines=ddp,deepspeed:2", "--precisions=fp32", "--no-compile"],
            6,
        ),
    ],
)
def test_command_on_the_run_files(name: str, changes: list[str], options: list[str], count: int) -> None:
    done = _command(["parity", f"configs/{name}.yaml", *changes, "--steps=5", "--json", "--world-sizes=2", *options])
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 0, done.stdout + done.stderr
    assert len(found["verdicts"]) == count


@pytest.mark.slow
def test_a_fault_that_no_engine_meets_is_an_error_of_the_test() -> None:
    with pytest.raises(RankError, match="planted where nothing passes"):
        measured_with(faults.clipping_per_rank, "deepspeed:2", "bf16")


def test_command_refuses_an_engine_it_does_not_know() -> None:
    done = _command(["parity", "configs/quickstart.yaml", "--engines=fdsp"])
    assert done.returncode == 2
    assert "'fdsp' is not an engine" in done.stderr


def _command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", *arguments], capture_output=True, text=True, timeout=900, check=False
    )
