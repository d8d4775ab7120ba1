"""Model FLOPs utilisation: peaks by name, the formula, and when there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bigtrain import models
from bigtrain.config.loader import from_dict
from bigtrain.dist import World
from bigtrain.telling import utilisation_of
from bigtrain.tracking.console import Console
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.mfu import Derived, Utilisation, peak_flops, utilisation
from bigtrain.trainer import assemble

GPT = {"vocab": 19, "layers": 2, "width": 12, "heads": 2, "mlp_width": 20, "context": 7}


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),  # older drivers leave out the maker
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_peak_is_found_by_the_whole_name(name: str, tera: float) -> None:
    assert peak_flops(name, torch.bfloat16) == pytest.approx(tera * 1e12)
    assert peak_flops(name, torch.float16) == peak_flops(name, torch.bfloat16)
    assert 0 < peak_flops(name, torch.float32) < peak_flops(name, torch.bfloat16)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10G",
        "cpu",
    ],
)
def test_a_peak_is_never_guessed(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None
    assert name in utilisation(models.build("gpt", GPT), name, torch.bfloat16, 1)


def test_no_peak_in_float64() -> None:
    assert peak_flops("NVIDIA H200", torch.float64) is None


def test_the_formula() -> None:
    model = models.build("gpt", GPT)
    found = utilisation(model, "NVIDIA H200", torch.bfloat16, 4)
    assert isinstance(found, Utilisation)
    assert found.at(1e6) == pytest.approx(model.flops_per_sample() * 1e6 / (4 * 989.4e12))


def test_a_model_that_does_not_know_its_cost_has_none() -> None:
    assert utilisation(nn.Linear(2, 2), "NVIDIA H200", torch.bfloat16, 1) == "Linear has no flops_per_sample()"


def test_float32_that_may_run_in_tf32_has_none() -> None:
    model = models.build("gpt", GPT)
    assert isinstance(utilisation(model, "NVIDIA H200", torch.float32, 1), Utilisation)
    torch.set_float32_matmul_precision("high")
    try:
        assert "TF32" in utilisation(model, "NVIDIA H200", torch.float32, 1)
        assert isinstance(utilisation(model, "NVIDIA H200", torch.bfloat16, 1), Utilisation)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("context", [7, 5])
def test_samples_shorter_than_the_models_have_none(context: int) -> None:
    run = {
        "task": "causal_lm",
        "model": {"name": "gpt", "args": GPT},
        "data": {"name": "synthetic", "args": {"kind": "causal_lm", "vocab": 19, "context": context}, "eval": "none"},
        "train": {"steps": 1},
        "precision": "bf16",
    }
    training = assemble(from_dict(run).config, World())
    found = utilisation_of(training, "NVIDIA H200")
    training.close()
    if context == 7:
        assert found == Utilisation(models.build("gpt", GPT).flops_per_sample(), 989.4e12)
    else:
        assert found == "the model says what 7 tokens cost (model.args.context), and samples have 5"


def test_lines_with_a_throughput_get_it(tmp_path: Path) -> None:
    tracker = Derived([MetricsFile(tmp_path / "metrics.jsonl")], Utilisation(3.0, 8.0))
    tracker.log({"step": 1, "samples_per_s": 2.0})
    tracker.log({"step": 1, "eval/loss": 0.5})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "samples_per_s": 2.0, "mfu": 0.75}, {"step": 1, "eval/loss": 0.5}]


def test_the_console_shows_it(tmp_path: Path) -> None:
    console = Console(10, "none", tmp_path / "log")
    row = {"step": 10, "epoch": 0, "loss": 0.25, "grad_norm": 1.5, "lr": [1e-3], "samples_per_s": 50.0}
    Derived([console], Utilisation(2.0, 400.0)).log(row)
    assert "50 samples/s  mfu 25.0%  epoch 1" in (tmp_path / "log").read_text()
