"""One process, one device: the plain module, with nothing around it."""

from __future__ import annotations

from torch import nn

from bigtrain.config.combinations import in_one_process, refuse
from bigtrain.dist import World
from bigtrain.engines.base import Choices, TorchEngine
from bigtrain.optim import OptimizerPlan


class SingleEngine(TorchEngine):
    """Trains in this process alone."""

    name = "single"

    def __init__(self, model: nn.Module, plan: OptimizerPlan, world: World, choices: Choices) -> None:
        refuse(in_one_process(world.size))
        super().__init__(model, model, plan, world, choices)
