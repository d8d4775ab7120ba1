"""Frozen parts cost no gradient and no optimizer memory, under every engine: counted in bytes, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import join
from bigtrain.engines import Choices, Engine
from bigtrain.engines.base import Zero
from bigtrain.loop import train_step
from bigtrain.optim import plan_optimizer
from bigtrain.protocols import Batch
from bigtrain.tasks.classification import Classification
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import build, everything, train

LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
MOMENTS, FP32 = 2, 4  # of AdamW
WIDTH, CLASSES = 32, 8  # all sizes even, so that no engine pads on two ranks


def small(frozen: bool) -> nn.Sequential:
    """Two frozen layers, or none, and two that train."""
    torch.manual_seed(0)
    sizes = [(16, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES)]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in sizes[:-1]]
    model = nn.Sequential(*layers, nn.Linear(*sizes[-1]))
    if frozen:
        model[:2].requires_grad_(False)
    return model


def engine_of(layout: str, model: nn.Module, world: Any) -> Engine:
    stage = int(layout[-1]) if layout.startswith("zero") else 0
    plan = plan_optimizer(model, schema.Optim())
    return engines.build(
        "deepspeed" if stage else layout, model, [], plan, world, Choices(clip_grad_norm=1.0, zero=Zero(stage=stage))
    )


def moments_in_memory(engine: Any) -> int:
    """Bytes of what this rank's optimizer itself holds, step counters aside."""
    kept = [value for state in engine._optimizer.state.values() for value in state.values()]
    tensors = [getattr(value, "_local_tensor", value) for value in kept if isinstance(value, Tensor) and value.ndim]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Watched(Classification):
    """Counts the nodes of the graph that backward will run."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def loss(self, model: nn.Module, batch: Batch) -> Any:
        result = super().loss(model, batch)
        seen: list[Any] = []
        waiting = [result.total.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.append(node)
                waiting += [before for before, _ in node.next_functions]
        self.nodes = len(seen)  # what backward will run
        return result


def count(layout: str, frozen: bool) -> dict[str, Any]:
    with join("cpu", needs_group=layout != "single") as world:
        model = small(frozen)
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine = engine_of(layout, model, world)
        task = Watched(engine)
        torch.manual_seed(world.rank)
        batch = Batch((torch.randn(6, 16), torch.randint(CLASSES, (6,))), torch.ones(6), 6)
        with engine.microbatch(last=True):
            engine.backward(task.loss(engine.model, batch))
        of_frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        zero = getattr(engine, "_zero", None)
        averaged = [g for group in getattr(zero, "averaged_gradients", {}).values() for g in group or () if g is not None]
        engine.step(1.0)
        train_step(engine, task, [batch], 1.0)
        found = {
            "parameters": parameters,
            "trained": trained,
            "bytes": moments_in_memory(engine),
            "nodes": task.nodes,
            "of_frozen": of_frozen,
            "averaged": sum(g.numel() for g in averaged),
        }
        engine.close()
        return found


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_optimizer_state_is_two_moments_of_what_trains(layout: str, world_size: int) -> None:
    for frozen in (True, False):
        ranks = run_distributed(count, world_size, layout, frozen)
        first = ranks[0]
        assert first["parameters"] == 17 * WIDTH + 2 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * CLASSES
        assert first["trained"] == (33 * WIDTH + 33 * CLASSES if frozen else first["parameters"])
        copies = world_size if layout == "ddp" else 1  # every rank repeats all; the others share it out
        assert sum(rank["bytes"] for rank in ranks) == copies * first["trained"] * MOMENTS * FP32
        assert all(rank["of_frozen"] == [] for rank in ranks)
        if layout in ("zero2", "zero3"):  # where DeepSpeed keeps slices of the gradients
            assert sum(rank["averaged"] for rank in ranks) == first["trained"]


def test_backward_does_not_go_through_what_is_frozen() -> None:
    nodes = {frozen: run_distributed(count, 1, "single", frozen)[0]["nodes"] for frozen in (True, False)}
    of_a_layer = (nodes[False] - nodes[True]) / 2
    assert of_a_layer == 5  # AccumulateGrad of weight and bias, the transposition, the product, ReLU


def count_pieces(layout: str) -> tuple[int, int]:
    """Of a model with prime sizes, tied weights and a scalar: bytes of moments in the state, and what trains."""
    with join("cpu", needs_group=layout != "single") as world:
        engine = build(layout, world, frozen=True, empty=False)
        train(engine, world, 1, range(2))
        kept = everything(engine, world).tensors
        moments = sum(t.nbytes for (kind, _), t in kept.items() if kind.startswith("exp_avg"))
        trained = sum(p.numel() for p in zoo.make_odd(True, empty=False).parameters() if p.requires_grad)
        engine.close()
        return moments, trained


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_a_checkpoint_has_moments_of_what_trains_alone(layout: str, world_size: int) -> None:
    moments, trained = run_distributed(count_pieces, world_size, layout)[0]
    assert moments == trained * MOMENTS * FP32
