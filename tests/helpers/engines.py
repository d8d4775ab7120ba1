"""Building and driving engines in tests: the odd model, its steps, its whole state."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.engines import Choices, Engine
from bigtrain.engines.base import Zero
from bigtrain.loop import train_step
from bigtrain.models.blocks import find_blocks, without_shared_parameters
from bigtrain.optim import plan_optimizer
from bigtrain.prepare import checkpoint_activations, compile_forward
from bigtrain.state import EngineState, MemoryReader, assemble
from tests.helpers import zoo

# The whole product of all axes instead of a part in which every value of every axis comes (`make matrix`).
IN_FULL = os.environ.get("BIGTRAIN_MATRIX") == "1"


def build(
    layout: str,
    world: World,
    *,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    optim: dict[str, Any] = zoo.ADAMW,
    recompute: str | int = "none",
    compute: torch.dtype | None = None,
    zero: Zero | None = None,
    empty: bool = True,
    compiled: bool = False,
    compiles_updates: bool = False,
) -> Engine:
    """The odd model under an engine; `hsdp` is fsdp with two ranks a copy, `zero2` is deepspeed in stage 2."""
    model = zoo.make_odd(frozen, dtype, empty)
    plan = plan_optimizer(model, schema.Optim.model_validate(optim), compiles=compiles_updates)
    stage = {f"zero{n}": n for n in range(4)}.get(layout)
    blocks = compiled_blocks = [block for _, block in find_blocks(model)]
    if compiled and stage == 3:  # what DeepSpeed cannot do: see test_what_cannot_be
        model.order = (0, 1, 2, 3)
        compiled_blocks = without_shared_parameters(model, blocks)
    choices = Choices(
        clip_grad_norm=zoo.CLIP,
        shard_size=2 if layout == "hsdp" else None,
        compute_dtype=compute,
        zero=replace(zero or Zero(), stage=stage or 0),
        compiled_blocks=compiled_blocks if compiled else (),
    )
    checkpoint_activations(blocks, recompute)
    if compiled:
        compile_forward(compiled_blocks, fullgraph=True)
    name = "deepspeed" if stage is not None else layout.replace("hsdp", "fsdp")
    return engines.build(name, model, blocks, plan, world, choices)


def train(engine: Engine, world: World, accumulation: int, steps: range) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    results = []
    for step in steps:
        batches = zoo.my_microbatches(step, world.rank, world.size, accumulation)
        result = train_step(engine, zoo.OddTask(), batches, zoo.lr_factor(step))
        assert not result.skipped
        results.append((float(result.loss), float(result.norm)))
    return results


def everything(engine: Engine, world: World) -> MemoryReader:
    """The whole state, put together from all ranks; on every rank."""
    state = engine.state()
    copied = EngineState([replace(piece, data=piece.data.clone()) for piece in state.pieces], state.hyper)
    return assemble(world.all_gather_object(copied))


def weights(reader: MemoryReader) -> dict[str, Tensor]:
    """The weights of a state, by name."""
    return {name: tensor for (kind, name), tensor in reader.tensors.items() if kind == "weight"}


def assert_same_state(ours: MemoryReader, theirs: MemoryReader, case: str = "") -> None:
    """Bitwise equal by name, hyperparameters included."""
    assert ours.tensors.keys() == theirs.tensors.keys(), case
    for key, tensor in theirs.tensors.items():
        assert ours.tensors[key].dtype == tensor.dtype, f"{case}: {key}"
        assert torch.equal(ours.tensors[key], tensor), f"{case}: {key}"
    assert ours.hyper == theirs.hyper, case
