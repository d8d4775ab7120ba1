"""How a training is spread over processes: one module an engine, one contract (`base.Engine`) for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bigtrain.dist import World
from bigtrain.engines.base import Choices, Engine
from bigtrain.engines.sums import StepResult
from bigtrain.optim import OptimizerPlan

__all__ = ["Choices", "Engine", "StepResult", "build", "choose", "needs_group", "shards"]

NAMES = ("single", "ddp", "fsdp", "deepspeed")


def choose(name: str, num_processes: int) -> tuple[str, str]:
    """The engine that `auto` means, and why; any other name is itself."""
    if name != "auto":
        return name, "asked for"
    if num_processes == 1:
        return "single", "there is one process"
    return "fsdp", f"it shards weights, gradients and optimizer state over the {num_processes} processes"


def needs_group(name: str) -> bool:
    """Whether the engine needs a process group even in a world of one."""
    return name != "single"


def shards(name: str, stage: int) -> bool:
    """Whether the engine cuts the model up itself, so that it must not be filled or moved before.

    Args:
        name: The engine.
        stage: DeepSpeed's.
    """
    return name == "fsdp" or (name == "deepspeed" and stage == 3)


def build(
    name: str,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    plan: OptimizerPlan,
    world: World,
    choices: Choices,
) -> Engine:
    """Build an engine around a prepared model. Every rank must call it."""
    if name == "deepspeed":
        from bigtrain.engines import deepspeed_config
        from bigtrain.engines.deepspeed import StageZeroEngine, ZeroEngine

        deepspeed_config.check(model, plan, choices)
        return (ZeroEngine if choices.zero.stage else StageZeroEngine)(model, plan, world, choices)
    if name == "single":
        from bigtrain.engines.single import SingleEngine

        return SingleEngine(model, plan, world, choices)
    if name == "ddp":
        from bigtrain.engines.ddp import DDPEngine

        return DDPEngine(model, plan, world, choices)
    from bigtrain.engines.fsdp import FSDPEngine

    return FSDPEngine(model, blocks, plan, world, choices)
