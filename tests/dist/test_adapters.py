"""Adapters under every engine: the same losses, frozen weights as they were, and going on from any to any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bigtrain
from bigtrain import models
from bigtrain.checkpoint import diff, open_checkpoint
from bigtrain.evaluating import find_checkpoint
from bigtrain.finetune.adapters import is_adapter
from bigtrain.tracking.reading import read_events, read_rows
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed

GPT = {"vocab": 257, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 8, "dropout": 0.0}
LAYOUTS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")


def settings(folder: Path, name: str, layout: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 1},
        "task": "causal_lm",
        "model": {"name": "gpt", "args": GPT},
        "data": {"name": "text", "args": {"source": str(folder / "it.txt"), "context": 8}, "batch_size": 6, "eval": "none"},
        "train": {"steps": 4, "micro_batch_size": 2},
        "optim": {"lr": 0.02},
        "engine": engine_of(layout),
        "checkpoint": {"every_steps": 2},
        "track": {"log_every": 1, "progress": "none", "report": False},
        "finetune": {
            "init_from": str(folder / "it.safetensors"),
            "adapter": {"targets": ["*.q_proj", "*.down_proj"], "rank": 3, "train": ["norm.weight"]},
        },
        **changes,
    }  # fmt: skip


def write(folder: Path) -> None:
    (folder / "it.txt").write_text("the quick brown fox jumps over the lazy dog, so it is told " * 4)
    torch.manual_seed(9)
    state = models.build("gpt", GPT).state_dict()
    save_file({name: torch.randn_like(tensor) / 4 for name, tensor in state.items()}, folder / "it.safetensors")


def train_all(folder: str) -> None:
    for layout in LAYOUTS:
        bigtrain.train(settings(Path(folder), layout, layout))
    # Broken off under one engine, gone on with under another.
    first = settings(Path(folder), "moved", "fsdp")
    bigtrain.train(first, hooks=[lambda info: info.stop() if info.step == 2 else None])
    bigtrain.train(settings(Path(folder), "moved", "zero3"))
    bigtrain.train(settings(Path(folder), "bf16", "fsdp", precision="bf16"))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if "loss" in row]


@pytest.mark.slow
def test_the_same_adapter_under_every_engine(tmp_path: Path) -> None:
    write(tmp_path)
    run_distributed(train_all, 2, str(tmp_path))
    alone = bigtrain.train(settings(tmp_path, "alone", "single")).path
    expected, digest = losses(alone), proved(alone)[0]["frozen_digest"]
    for name in (*LAYOUTS, "moved", "bf16"):
        run = tmp_path / "runs" / name
        tolerance = 0.02 if name == "bf16" else 1e-5
        assert losses(run) == pytest.approx(expected, rel=tolerance), name
        assert {row["frozen_digest"] for row in proved(run)} == {digest}, name
        assert [row["moved"] for row in proved(run)][-1] == 9 if name != "moved" else True
        with open_checkpoint(find_checkpoint(run)) as reader:
            assert all(is_adapter(key[1]) or key[1] == "norm.weight" for key in reader.index), name
    found = diff(find_checkpoint(tmp_path / "runs" / "moved"), find_checkpoint(alone))
    assert all(each.largest is None or each.largest < 1e-3 for each in found.differences if each.kind == "weight")


def proved(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_events(run) if row["event"] == "phase proved"]
