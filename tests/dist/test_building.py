"""What building an engine takes beside what it holds, and that replicas begin as rank 0 has it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.trainer import Subject, assemble
from tests.helpers.distributed import run_distributed

MIB = 1 << 20
GPT = {"vocab": 8000, "layers": 4, "width": 512, "heads": 8, "context": 16}  # 80 MiB, 16 of them in either table


def anonymous() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def run_file(engine: str, model: str, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": "causal_lm",
        "model": {"name": model, "args": args},
        "data": {
            "name": "synthetic",
            "args": {"kind": "causal_lm", "samples": 4, "context": 16, "vocab": 8000},
            "batch_size": 2,
            "eval": "none",
        },
        "train": {"steps": 1},
        "engine": {"name": engine, "device": "cpu"},
    }


def measure(engine: str) -> tuple[int, int]:
    """Bytes of the weights that this rank holds, and the most that building takes."""
    with join("cpu", needs_group=True) as world:
        assemble(from_dict(run_file(engine, "gpt", {**GPT, "vocab": 8000, "layers": 1, "width": 16})).config, world).close()
        most, before, is_over = 0, anonymous(), threading.Event()

        def watch() -> None:
            nonlocal most
            while not is_over.wait(0.001):
                most = max(most, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        training = assemble(from_dict(run_file(engine, "gpt", GPT)).config, world)
        is_over.set()
        watcher.join()
        held = sum(piece.data.nbytes for piece in training.engine.state().pieces if piece.kind == "weight")
        training.close()
        return held, max(most, anonymous()) - before


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_building_takes_little_beside_the_weights(engine: str) -> None:
    for held, most in run_distributed(measure, 2, engine):
        assert held > 39 * MIB
        assert most < held + 32 * MIB  # a second copy of what a rank holds would be more, DDP's buckets filled too


class Drawn(nn.Module):
    """A model whose values no seed decides, as those of a careless factory."""

    def __init__(self, of: list[float]) -> None:
        super().__init__()
        value = of[torch.distributed.get_rank()]
        self.table = nn.Parameter(torch.full((8000, 3), value))
        self.scale = nn.Parameter(torch.tensor(value))
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.register_buffer("mask", torch.full((3,), value > 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens] @ self.table.T * self.scale


def begun(of: list[float]) -> dict[str, list[float]]:
    with join("cpu", needs_group=True) as world:
        config = from_dict(run_file("ddp", "given", {})).config
        training = assemble(config, world, Subject(model=lambda: Drawn(of)))
        state = {name: tensor.unique().tolist() for name, tensor in training.model.state_dict().items()}
        training.close()
        return state


def test_replicas_begin_with_what_rank_0_has() -> None:
    expected = {"table": [0.25], "scale": [0.25], "frozen": [0.25], "mask": [False]}
    assert run_distributed(begun, 2, [0.25, 0.75]) == [expected] * 2
