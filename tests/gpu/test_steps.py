"""A step on a GPU: nobody waits, fused kernels update, numbers that are not finite are noticed a step late."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.engines import Choices
from bigtrain.errors import NonFiniteError
from bigtrain.loop import Loop
from bigtrain.moving import moved
from bigtrain.optim import plan_optimizer
from bigtrain.progress import Cadence, Hook, StepInfo
from bigtrain.protocols import Batch
from bigtrain.tasks.regression import Regression
from tests.helpers.gpu import gpt_run, no_waiting, training

DEVICE = torch.device("cuda", 0)
SETTLING = 4  # steps in which torch allocates, compiles, and lays out its buckets


def no_waiting_in(run: dict[str, Any]) -> None:
    with training(run) as built:
        loop = built.loop()
        for _ in range(SETTLING):
            loop._one_step()
        with no_waiting():
            for _ in range(4):
                loop._one_step()
        assert loop._watch.last() is None


@pytest.mark.parametrize("compiled", ["none", "blocks"])
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_nobody_waits_in_a_steady_step(engine: str, compiled: str) -> None:
    no_waiting_in(gpt_run(engine, compile=compiled))


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("recompute", ["full", "ops"])
def test_nobody_waits_where_activations_are_computed_again(engine: str, recompute: str) -> None:
    no_waiting_in(gpt_run(engine, activation_checkpointing=recompute))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nobody_waits_for_images(precision: str, workers: int) -> None:
    no_waiting_in(
        {
            "task": {"name": "classification", "args": {"class_weights": [1.0] * 10, "label_smoothing": 0.1}},
            "model": {"name": "torchvision/resnet18", "args": {"num_classes": 10}},
            "data": {
                "name": "synthetic",
                "args": {"kind": "classification", "samples": 48},
                "eval": "none",
                "batch_size": 16,
                "workers": workers,
            },
            "train": {"steps": 1000},
            "precision": precision,
            "track": {"log_every": 1000},
            "engine": {"name": "single", "device": "cuda"},
        }
    )


def test_batches_go_over_without_waiting() -> None:
    wide = torch.randn(6, 10, dtype=torch.float64)
    data = {"tokens": torch.arange(12).view(3, 4)[:, 1:], "pair": (wide.T, torch.tensor([True, False]))}
    batch = Batch(data, torch.ones(3), 3, range(3))
    moved(batch, DEVICE, torch.float32)  # the first pinned memory is allocated
    torch.cuda.synchronize()
    with no_waiting():
        there = moved(batch, DEVICE, torch.float32)
    assert there.data["tokens"].device == there.weight.device == DEVICE
    assert torch.equal(there.data["tokens"].cpu(), data["tokens"])
    assert torch.equal(there.data["pair"][0].cpu(), wide.T.float())
    assert torch.equal(there.data["pair"][1].cpu(), data["pair"][1])


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_optimizers_are_fused(engine: str) -> None:
    with training(gpt_run(engine)) as built:
        built.loop()._one_step()
        optimizer = built.engine._optimizer
        assert all(group["fused"] for group in optimizer.param_groups)
        assert all(state["step"].is_cuda for state in optimizer.state.values())
        assert optimizer.found_inf.is_cuda
        assert optimizer.grad_scale.is_cuda


# ----------------------------------------------------------------------------------------- numbers not finite


def batches(poisoned: int) -> Iterator[Any]:
    """Endless steps of one microbatch; one of them has a number that is none."""
    generator = torch.Generator().manual_seed(0)
    step = 0
    while True:
        inputs, targets = torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)
        if step == poisoned:
            inputs[2, 1] = math.nan
        batch = Batch((inputs, targets), torch.ones(5), 5, range(100 * step, 100 * step + 5))
        step += 1
        yield SimpleNamespace(microbatches=[batch], epoch=0, end=(0, step), num_samples=5)


def make_loop(policy: str, hook: Hook, optimizer: str = "adamw") -> tuple[Loop, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).to(DEVICE)
    args = {"momentum": 0.9} if optimizer == "sgd" else {}
    plan = plan_optimizer(model, schema.Optim.model_validate({"name": optimizer, "args": args}))
    world = World(device=DEVICE)
    engine = engines.build("single", model, [], plan, world, Choices(clip_grad_norm=1.0))
    loop = Loop(
        engine,
        Regression(),
        world,
        batches(poisoned=2),
        None,
        lambda step: 1.0,
        [1e-3],
        Cadence(total_steps=6, log_every=100),
        (),
        [hook],
        policy,
        lambda batch: moved(batch, DEVICE, torch.float32),
    )
    return loop, model


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    slots = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *slots)]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_step_that_is_not_finite_is_left_out_on_the_device(optimizer: str) -> None:
    after: dict[int, list[Tensor]] = {}
    loop, model = make_loop(
        "skip", Hook(lambda info: after.update({info.step: snapshot(model, loop._engine._optimizer)})), optimizer
    )
    outcome = loop.run()
    assert (outcome.steps, outcome.num_skipped) == (6, 1)
    assert all(torch.equal(a, b) for a, b in zip(after[2], after[3], strict=True))  # step 3 has the bad number
    assert not any(torch.equal(a, b) for a, b in zip(after[3][:4], after[4][:4], strict=True))


def test_it_is_noticed_one_step_late() -> None:
    told: list[StepInfo] = []
    loop, _ = make_loop("stop", Hook(told.append))
    with pytest.raises(NonFiniteError) as caught:
        loop.run()
    assert "the loss is not finite in step 3" in caught.value.problem
    assert caught.value.where == "rank 0: samples 200, 201, 202, 203, 204"
    assert [info.step for info in told] == [1, 2, 3]
    assert math.isnan(told[-1].loss)


def test_a_steady_step_with_a_number_that_is_none_waits_for_nobody() -> None:
    loop, _ = make_loop("skip", Hook(lambda info: None))
    loop._one_step()
    loop._one_step()
    with no_waiting():
        for _ in range(3):
            loop._one_step()
    loop._watch.last()
    assert loop._watch.num_skipped == 1
