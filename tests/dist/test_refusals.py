"""What engines and the loop refuse over several ranks: parameters, buffers and optimizers that cannot be honoured."""

from __future__ import annotations

from itertools import repeat
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import World, join
from bigtrain.engines import Choices
from bigtrain.errors import CombinationError
from bigtrain.loop import Loop
from bigtrain.progress import Cadence
from bigtrain.optim import plan_optimizer
from bigtrain.protocols import Batch
from bigtrain.tasks.regression import Regression
from tests.helpers.distributed import run_distributed


class Idle(nn.Module):
    """A layer that takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Averaging(nn.Module):
    """A buffer made of whatever samples a rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # the same on every rank: no matter

    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(x.mean(0))
        self.calls += 1
        return self.layer(x)


class Counting(Averaging):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


class StepData(NamedTuple):
    microbatches: list[Batch]
    epoch: int = 0
    num_samples: int = 4
    end: tuple[int, int] = (0, 0)


def run(engine_name: str, model: nn.Module, world: World, **optim: Any) -> str:
    """Two steps under an engine: how they end."""
    plan = plan_optimizer(model, schema.Optim.model_validate(optim))
    engine = engines.build(engine_name, model, [], plan, world, Choices())
    generator = torch.Generator().manual_seed(world.rank)
    inputs, targets = torch.randn(2, 4, generator=generator), torch.randn(2, 1, generator=generator)
    data = StepData([Batch((inputs, targets), torch.ones(2), 2, range(2))])
    loop = Loop(
        engine=engine,
        task=Regression(),
        world=world,
        steps=repeat(data),
        eval_batches=None,
        schedule=lambda step: 1.0,
        base_lrs=[1e-3],
        cadence=Cadence(2, log_every=1),
        trackers=[],
        hooks=[],
        on_nonfinite="stop",
        move=lambda batch: batch,
    )
    try:
        loop.run()
    except CombinationError as error:
        return f"{error.problem} {error.remedy}"
    return f"{loop.outcome.steps} steps"


def every_case() -> dict[str, str]:
    torch.manual_seed(0)
    with join("cpu") as world:
        return {
            "idle, fsdp": run("fsdp", Idle(), world),
            "idle, ddp": run("ddp", Idle(), world),
            "averaging, ddp": run("ddp", Averaging(), world),
            "averaging, fsdp": run("fsdp", Averaging(), world),
            "counting": run("ddp", Counting(), world),
            "adafactor, fsdp": run("fsdp", nn.Linear(4, 1), world, name="torch.optim:Adafactor"),
            "adafactor, ddp": run("ddp", nn.Linear(4, 1), world, name="torch.optim:Adafactor"),
        }


@pytest.fixture(scope="module")
def told() -> list[dict[str, str]]:
    return run_distributed(every_case, 2)


def test_ddp_names_parameters_that_take_no_part(told: list[dict[str, str]]) -> None:
    for cases in told:
        assert "take no part in the loss: idle.weight, idle.bias" in cases["idle, ddp"]
        assert "finetune.freeze" in cases["idle, ddp"]
        assert cases["idle, fsdp"] == "2 steps"


def test_buffers_of_a_ranks_own_samples_are_refused(told: list[dict[str, str]]) -> None:
    for cases in told:
        for engine in ("ddp", "fsdp"):
            assert "the buffer mean of rank 1 is not that of rank 0" in cases[f"averaging, {engine}"]
        assert cases["counting"] == "2 steps"


def test_an_optimizer_that_cannot_update_shards_is_told(told: list[dict[str, str]]) -> None:
    for cases in told:
        assert "the optimizer Adafactor cannot update sharded parameters" in cases["adafactor, fsdp"]
        assert "engine.name to ddp" in cases["adafactor, fsdp"]
        assert cases["adafactor, ddp"] == "2 steps"
