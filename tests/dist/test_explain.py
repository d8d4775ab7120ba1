"""The bytes that `bigtrain explain` predicts, against what the engines have in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import engines, models
from bigtrain.config.loader import from_dict
from bigtrain.config.schema import Config
from bigtrain.dist import World, join
from bigtrain.engines import Choices, slots
from bigtrain.engines.base import Zero
from bigtrain.explain import Footprint, explain
from bigtrain.finetune.freeze import plan_freezing
from bigtrain.models.blocks import find_blocks
from bigtrain.optim import plan_optimizer
from bigtrain.protocols import LossSum
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed

# Tied weights, a scalar, three rows over four ranks, buffers that are saved and one that is not.
ODD = {"name": "tests.helpers.zoo:make_odd", "args": {"empty": False}}
GPT = {
    "name": "gpt",
    "args": {"vocab": 37, "layers": 3, "width": 24, "heads": 2, "kv_heads": 1, "mlp_width": 40, "context": 8},
}
ADAFACTOR = {"name": "torch.optim:Adafactor", "lr": 1e-2}
FREEZE = {ODD["name"]: ["layers.0.*", "layers.2.up.*"], GPT["name"]: ["layers.1.*", "embed_tokens.*"]}
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}

TORCH_CASES = [
    (ODD, "fp32", zoo.ADAMW, False),
    (ODD, "fp64", zoo.ADAMW, True),
    (ODD, "fp32", zoo.SGD, False),
    (ODD, "fp32", zoo.BF16_MOMENTS, True),
    (ODD, "fp32", zoo.NORMALISED, True),
    (GPT, "bf16", {"name": "adamw"}, True),
]
ZERO_CASES = [
    (ODD, "fp32", zoo.ADAMW, False),
    (ODD, "fp32", zoo.SGD, True),
    (ODD, "fp32", zoo.BF16_MOMENTS, False),
    (GPT, "bf16", {"name": "adamw"}, True),
]
SPAWNS = [
    (1, ("single", "ddp", "fsdp"), TORCH_CASES),
    (2, ("ddp", "fsdp"), TORCH_CASES),
    (4, ("fsdp", "fsdp shard_size=2"), TORCH_CASES[:1]),
    pytest.param(2, [f"deepspeed stage={stage}" for stage in range(4)], ZERO_CASES, marks=pytest.mark.slow),
]


def configured(model: dict[str, Any], precision: str, optim: dict[str, Any], frozen: bool) -> Config:
    values = {
        "task": "classification",
        "model": model,
        "data": {"name": "digits"},
        "train": {"steps": 1},
        "optim": optim,
        "engine": {"fsdp": {"shard_size": 2}},
        "finetune": {"freeze": FREEZE[model["name"]] if frozen else []},
    }
    return from_dict(values).config.model_copy(update={"precision": precision})


def build(config: Config, label: str, world: World) -> tuple[engines.Engine, nn.Module]:
    """The engine that a line of the table is about, around its model."""
    name, _, setting = label.partition(" ")
    value = int(setting.partition("=")[2] or 0)
    model = models.build(config.model.name, config.model.args).to(DTYPES[config.precision])
    plan_freezing(model, config.finetune).apply(model, 0)
    choices = Choices(
        shard_size=value if name == "fsdp" and value else None,
        compute_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        zero=Zero(stage=value),
    )
    blocks = [block for _, block in find_blocks(model)]
    return engines.build(name, model, blocks, plan_optimizer(model, config.optim), world, choices), model


def held(label: str, case: Any) -> dict[str, int]:
    """What this rank has in memory: gradients after either of two microbatches, all else after the step."""
    with join("cpu", needs_group=label != "single") as world:
        engine, model = build(configured(*case), label, world)
        tokens = torch.arange(8).view(1, 8) if case[0] == GPT else torch.arange(8)
        gradients = 0
        for last in (False, True):
            with engine.microbatch(last=last):
                engine.backward(LossSum(engine.model(tokens).float().sum(), torch.tensor(8.0)))
                copies = copies_in_place(model)
            gradients = max(gradients, gradients_of(engine, model))
        assert not engine.step(1.0).skipped
        found = {"gradients": gradients, "copies": copies, **weights_of(engine, model)}
        engine.close()
        return found


def all_held(pairs: list[tuple[str, Any]]) -> list[dict[str, int]]:
    return [held(label, case) for label, case in pairs]


def copies_in_place(model: nn.Module) -> int:
    """Bytes of what stands in the places of parameters and is none."""
    used = {p for module in model.modules() for p in module._parameters.values() if p is not None}
    return nbytes(t for t in used if not isinstance(t, nn.Parameter))


def gradients_of(engine: Any, model: nn.Module) -> int:
    own = nbytes(slots.local(p.grad) for p in model.parameters() if p.grad is not None)
    zero = getattr(engine, "_zero", None)
    flat = getattr(zero, "fp32_groups_gradients_flat", None)  # stage 1 in bf16
    slices = getattr(zero, "averaged_gradients", {}).values()  # stages 2 and 3
    return own + nbytes(flat if flat is not None else (t for group in slices if group for t in group if t is not None))


def weights_of(engine: Any, model: nn.Module) -> dict[str, int]:
    buffers = nbytes(model.buffers())
    if not hasattr(engine, "_slices"):
        by_kind = [(piece.kind, piece.data.nbytes) for piece in engine.state().pieces]
        weights = sum(size for kind, size in by_kind if kind == "weight")
        optimizer = sum(size for kind, size in by_kind if kind not in ("weight", "buffer"))
        return {"weights": weights, "masters": 0, "optimizer": optimizer, "buffers": buffers}
    weights = [getattr(p, "ds_tensor", p).data for p in model.parameters()]
    kept = [flat for _, flat in engine._frozen_parts.values()]
    places = {t.untyped_storage().data_ptr() for t in weights}
    apart = [t for t in kept if t.untyped_storage().data_ptr() not in places]
    flats = {id(part.flat): part.flat for part in engine._slices.by_name.values()}.values()
    state = [v for s in engine._optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return {
        "weights": nbytes(weights),
        "masters": nbytes(flats) + nbytes(apart),
        "optimizer": nbytes(state),
        "buffers": buffers,
    }


def nbytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def predicted(case: Any, world_size: int) -> dict[str, Footprint]:
    return {each.label: each for each in explain(configured(*case), world_size=world_size).footprints}


@pytest.mark.parametrize(("world_size", "labels", "cases"), SPAWNS)
def test_predicted_bytes_are_those_in_memory(world_size, labels, cases):
    lines = [predicted(case, world_size) for case in cases]
    wanted = {(label, i): lines[i][label] for label in labels for i in range(len(cases))}
    run = [key for key, footprint in wanted.items() if footprint.refusal is None]
    by_rank = run_distributed(all_held, world_size, [(label, cases[i]) for label, i in run])
    for key, first, *others in zip(run, *by_rank, strict=True):
        for kind in ("weights", "masters", "gradients", "optimizer", "buffers"):
            assert first[kind] == getattr(wanted[key], kind), (key, kind)
            assert all(other[kind] <= first[kind] for other in others), (key, kind)
        if key[0] in ("single", "ddp"):
            assert first["copies"] == wanted[key].working, key


def test_what_deepspeed_refuses_is_not_counted():
    refused = {("bf16", 0), ("fp64", 0), ("fp64", 1), ("fp64", 2), ("fp64", 3)}
    for precision in DTYPES:
        lines = predicted((ODD, precision, zoo.ADAMW, False), 2)
        for stage in range(4):
            footprint = lines[f"deepspeed stage={stage}"]
            assert bool(footprint.refusal) == ((precision, stage) in refused) == (footprint.on_device == 0)


def test_an_optimizer_that_keeps_less_than_a_number_for_each_element():
    case = (GPT, "fp32", ADAFACTOR, False)
    found = run_distributed(held, 1, "single", case)[0]
    wanted = predicted(case, 1)["single"]
    assert found["optimizer"] == wanted.optimizer < wanted.weights / 4
