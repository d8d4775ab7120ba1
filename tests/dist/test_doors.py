"""A checkpoint of ours under DeepSpeed's own loading, and DeepSpeed's own checkpoint under ours."""

from __future__ import annotations

import sys
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigtrain
from bigtrain.checkpoint import find, open_checkpoint
from bigtrain.doors.exporting import export
from bigtrain.doors.incoming import bring_in
from bigtrain.state import whole
from tests.helpers.distributed import run_distributed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 7)
        self.down = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def data() -> Any:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 3, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))


def train_and_export(folder: str, moments: str) -> None:
    values = {
        "run": {"name": "run", "dir": folder},
        "task": "regression",
        "data": {"name": "x", "batch_size": 4, "eval": "none"},
        "train": {"steps": 5},
        "optim": {
            **{"name": "adamw", "lr": 0.01, "decay_norms_and_biases": True},
            **{"moments": moments, "args": {"betas": [0.9, 0.95]}},
        },
        "engine": {"name": "fsdp", "device": "cpu"},
        "track": {"progress": "none"},
    }
    run = bigtrain.train(values, model=Net, data=data())
    if int(os.environ["RANK"]) == 0:
        with open_checkpoint(find(run.path / "checkpoints")[0]) as reader:
            export(reader, Path(folder, "deepspeed"), "deepspeed")


def deepspeed_engine(stage: int, universal: bool) -> Any:
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for half a minute, for inference alone

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, betas=(0.9, 0.95))
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def load_with_deepspeed(folder: str, stage: int) -> dict[str, dict[str, Any]]:
    warnings.simplefilter("ignore")  # DeepSpeed's own
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = deepspeed_engine(stage, universal=True)
    engine.load_checkpoint(str(Path(folder, "deepspeed")))
    found = {}
    for name, p in engine.module.named_parameters():
        moments = {key: safe_get_full_optimizer_state(p, key).reshape(p.ds_shape if stage == 3 else p.shape)
                   for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
        full = safe_get_full_fp32_param(p).reshape(p.ds_shape if stage == 3 else p.shape)
        found[name] = {kind: value.detach().numpy() for kind, value in {"weight": full, **moments}.items()}
    assert engine.global_steps == 5
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "moments"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_deepspeed_loads_it(tmp_path: Path, stage: int, moments: str) -> None:
    run_distributed(train_and_export, 2, str(tmp_path), moments)
    found = run_distributed(load_with_deepspeed, 2, str(tmp_path), stage)[0]
    with open_checkpoint(find(tmp_path / "run" / "checkpoints")[0]) as reader:
        for (kind, name), spec in reader.index.items():
            if kind == "step":
                continue
            expected = torch.empty(spec.shape)
            reader.read_into(kind, name, whole(spec.shape), expected)
            assert (found[name][kind] == expected.numpy()).all(), (kind, name)


def save_with_deepspeed(folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # DeepSpeed's own
    from deepspeed.utils import safe_get_full_fp32_param

    engine = deepspeed_engine(2, universal=False)
    inputs, targets = data().tensors
    for _ in range(3):
        loss = nn.functional.mse_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder)
    return {name: safe_get_full_fp32_param(p).detach().numpy() for name, p in engine.module.named_parameters()}


@pytest.mark.slow
def test_what_deepspeed_saved_comes_in(tmp_path: Path) -> None:
    weights = run_distributed(save_with_deepspeed, 2, str(tmp_path / "theirs"))[0]
    warnings.simplefilter("ignore")
    path = bring_in(tmp_path / "theirs", tmp_path / "in", "deepspeed", allow_pickle=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "theirs"]  # the converted copy is gone
    assert path.name == "step-00000003"
    with open_checkpoint(path) as reader:
        assert {kind for kind, _ in reader.index} >= {"weight", "exp_avg", "exp_avg_sq"}
        for name, expected in weights.items():
            out = torch.empty(expected.shape)
            reader.read_into("weight", name, whole(expected.shape), out)
            assert (out.numpy() == expected).all(), name
