"""One process, one device: the plain module, with nothing around it."""

from __future__ import annotations

from torch import nn

from bigtrain.dist import World
from bigtrain.engines.base import Choices, TorchEngine
from bigtrain.errors import CombinationError
from bigtrain.optim import OptimizerPlan


class SingleEngine(TorchEngine):
    """Trains in this process alone."""

    name = "single"

    def __init__(self, model: nn.Module, plan: OptimizerPlan, world: World, choices: Choices) -> None:
        if world.size > 1:
            raise CombinationError(
                f"the engine single runs in one process, and there are {world.size}",
                where="engine.name",
                remedy="set engine.name to ddp, fsdp or auto, or launch.nproc to 1",
            )
        super().__init__(model, model, plan, world, choices)
