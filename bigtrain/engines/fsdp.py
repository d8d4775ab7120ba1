"""FSDP2 (`torch.distributed.fsdp.fully_shard`): everything sharded by rows over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigtrain.config.combinations import of_fsdp, refuse
from bigtrain.dist import World
from bigtrain.engines.base import Choices, Held, TorchEngine
from bigtrain.errors import CombinationError
from bigtrain.models.blocks import without_shared_parameters
from bigtrain.optim import OptimizerPlan
from bigtrain.state import Box


class FSDPEngine(TorchEngine):
    """Shards the model, block by block.

    Args:
        model: The plain module; on the meta device if `choices.fill` gives it values.
        blocks: Its repeated parts, each gathered and given back on its own.
        plan: The optimizer to build.
        world: This rank's place.
        choices: What the run file says.
    """

    name = "fsdp"

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        plan: OptimizerPlan,
        world: World,
        choices: Choices,
    ) -> None:
        cpu_offload = choices.cpu_offload and world.device.type == "cpu"
        refuse(of_fsdp(cpu_offload=cpu_offload, shard_size=choices.shard_size, processes=world.size))
        self._mesh = _mesh(world, choices.shard_size)
        # Their gradients are summed in _collect_gradients.
        whole = {p for p in model.parameters() if stays_whole(p)}
        offload: OffloadPolicy = CPUOffloadPolicy() if choices.cpu_offload else OffloadPolicy()
        # Inputs are cast where the model begins, as under every engine, not where each block does.
        precision = MixedPrecisionPolicy(choices.compute_dtype, torch.float32, cast_forward_inputs=False)
        shared: dict[str, Any] = {"mesh": self._mesh, "offload_policy": offload, "ignored_params": whole}
        if choices.compute_dtype is not None:
            shared["mp_policy"] = precision
        for block in without_shared_parameters(model, blocks, whole):  # FSDP2 wants all uses of one in one group
            fully_shard(block, reshard_after_forward=choices.reshard_after_forward, **shared)
        # The root's own parameters are needed again as soon as backward begins: giving them back would only cost.
        fully_shard(model, reshard_after_forward=False, **shared)
        for module in _sharded_modules(model):
            # Sums instead of means; both switches on every module, they are not recursive.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if choices.fill:
            model.to_empty(device="cpu" if choices.cpu_offload else world.device)
        # fully_shard moves what it shards; the rest is computed with where it lies.
        for tensor in (*filter(stays_whole, model.parameters()), *model.buffers()):
            if tensor.device != world.device:
                tensor.data = tensor.data.to(world.device)
        self._locals_are_fresh = False
        self._is_elementwise = plan.elementwise
        super().__init__(model, model, plan, world, choices)
        self._whole = [p for p in self._updated.values() if stays_whole(p)]

    def _held(self, tensor: Tensor, position: int) -> Held:
        if not isinstance(tensor, DTensor):
            return super()._held(tensor, position)
        size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        replica = self._mesh.get_local_rank("replicate") if self._mesh.ndim == 2 else 0
        replicas = self._mesh.size(0) if self._mesh.ndim == 2 else 1
        return Held(tensor, tuple(tensor.shape), Box(tuple(offset), tuple(size)), position % replicas == replica)

    def _parameters_to_cast(self) -> list[Tensor]:
        # FSDP2 casts what it gathers.
        return [p for p in super()._parameters_to_cast() if stays_whole(p)]

    def _tensors_to_update(self, plan: OptimizerPlan) -> dict[str, Tensor]:
        if not plan.elementwise:
            return {name: self._as_dtensor(tensor) for name, tensor in super()._tensors_to_update(plan).items()}
        # Shards as plain tensors: an elementwise update needs no DTensor, and going through one costs several times
        # the update.
        return {
            name: nn.Parameter(held.local) if isinstance(held.tensor, DTensor) else held.tensor
            for name, held in ((name, self._weights[name]) for name in self._trained)
        }

    def _as_dtensor(self, tensor: Tensor) -> Tensor:
        """A parameter that stays whole as a DTensor over the same memory: many an operation takes all or none."""
        if isinstance(tensor, DTensor):
            return tensor
        return nn.Parameter(self._replicated(tensor.detach()))

    def _replicated(self, tensor: Tensor) -> DTensor:
        return DTensor.from_local(tensor, self._mesh, [Replicate()] * self._mesh.ndim, run_check=False)

    def _collect_gradients(self) -> list[Tensor]:
        if not self._locals_are_fresh:
            self._refresh_locals()
        gradients = []
        for name, updated in self._updated.items():
            tensor = self._weights[name].tensor
            if tensor.grad is None:
                updated.grad = None
                continue
            if stays_whole(tensor):
                self._world.all_reduce(tensor.grad)
            if updated is not tensor:
                is_shard = isinstance(tensor.grad, DTensor)
                updated.grad = _plain(tensor.grad) if is_shard else self._replicated(tensor.grad)
            gradients.append(updated.grad)
        return gradients  # type: ignore[return-value]

    def _refresh_locals(self) -> None:
        # FSDP pads uneven shards at the first forward, and then they lie elsewhere.
        for name, updated in self._updated.items():
            if not isinstance(updated, DTensor):
                updated.data = self._weights[name].local
        self._locals_are_fresh = True

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        sharded = [g for g in gradients if g.ndim > 0]
        replicas = self._mesh.size(0) if self._mesh.ndim == 2 else 1
        squared = super()._squared_norm([_plain(g) for g in sharded]) / replicas
        squared = squared.to(self._world.device)
        for p in self._whole:
            if p.grad is not None:
                squared += _plain(p.grad).double().square().sum() / self._world.size
        return squared

    def _update(self, gradients: list[Tensor], divisor: Tensor | float, skipped: Tensor | bool) -> None:
        if self._is_elementwise:
            super()._update(gradients, divisor, skipped)
            return
        try:
            super()._update(gradients, divisor, skipped)
        except (RuntimeError, NotImplementedError) as cause:  # what DTensor raises where it does not know an operation
            name = type(self._optimizer).__name__
            raise CombinationError(
                f"the optimizer {name} cannot update sharded parameters: {str(cause).partition(chr(10))[0]}",
                where="optim.name",
                remedy="set engine.name to ddp; or, where the update of an element depends on that element alone,\n"
                f"say so by a class attribute, {name}.elementwise = True",
            ) from cause

    def _reduce(self, sums: Tensor) -> Tensor:
        return self._world.sum_of_step(sums)

    def _communicating(self, *, last: bool) -> AbstractContextManager[Any]:
        # Gradients are sharded in every microbatch, so that they never lie whole; replicas are summed in the last.
        if self._mesh.ndim == 2:
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        return nullcontext()

    def _zero(self) -> None:
        for name, updated in self._updated.items():
            self._weights[name].tensor.grad = updated.grad = None

    def _after_evaluation(self) -> None:
        # The root keeps its parameters gathered after a forward without a backward.
        for module in _sharded_modules(self.model):
            module.reshard()


def stays_whole(parameter: Tensor) -> bool:
    """Whether a parameter is not sharded: FSDP2 takes none of no dimension, and its kernels none of no elements."""
    return parameter.ndim == 0 or parameter.numel() == 0


def _plain(gradient: Tensor) -> Tensor:
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _mesh(world: World, shard_size: int | None) -> DeviceMesh:
    """All ranks in a row, or replicas × shards."""
    if shard_size is None or shard_size == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
