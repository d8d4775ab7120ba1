"""DistributedDataParallel: every rank holds the whole model, gradients are summed bucket by bucket while backward runs.

Annotations are not postponed in this module: torch compares those of a communication hook with the classes themselves.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.utils import _verify_param_shape_across_processes
from torch.nn.parallel import DistributedDataParallel

from bigtrain.dist import World
from bigtrain.engines.base import Choices, TorchEngine, take_no_part
from bigtrain.optim import OptimizerPlan

# torch 2.15 renames the switch, and warns about the old name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class DDPEngine(TorchEngine):
    """Replicates the model."""

    name = "ddp"

    def __init__(self, model: nn.Module, plan: OptimizerPlan, world: World, choices: Choices) -> None:
        no_sync: dict[str, Any] = {_NO_BUFFER_SYNC: False}
        _agree(model, world)
        wrapped = _Replicated(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            process_group=world.group,
            gradient_as_bucket_view=True,
            init_sync=False,
            **no_sync,  # buffers that ranks would change differently are refused before
        )
        # Sums: the loss is divided by the targets of the global batch, not by the number of ranks.
        wrapped.register_comm_hook(world.group, _sum_bucket)
        _settle_buckets(wrapped)
        super().__init__(model, wrapped, plan, world, choices)

    def _communicating(self, *, last: bool) -> AbstractContextManager[Any]:
        # Gradients are summed over ranks in the last microbatch only.
        return nullcontext() if last else self.model.no_sync()  # type: ignore[operator]

    def _collect_gradients(self) -> list[Tensor]:
        without = [name for name in self._weights if name in self._updated and self._updated[name].grad is None]
        if without:
            # DDP would wait for them forever. It could look for them in every step, which costs a seventh of the step
            # of a small transformer on a CPU.
            raise take_no_part("ddp", without)
        return super()._collect_gradients()

    def _reduce(self, sums: Tensor) -> Tensor:
        # The gradient is the same on every rank already; loss and count are not.
        self._world.sum_of_step(sums[1:])
        return sums


class _Replicated(DistributedDataParallel):
    """DDP that is told of the parameters in the order in which backward reaches them, the last first."""

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, expect_sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        return parameters[::-1], expect_sparse[::-1]


def _agree(model: nn.Module, world: World) -> None:
    """Give every rank what rank 0 has: values that a model draws without a seed would differ. Every rank must call it.

    DDP itself needs buffers of 250 MB or the largest parameter for it; here a tensor is received where it lies.
    """
    assert world.group is not None
    _verify_param_shape_across_processes(world.group, list(model.parameters()))
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]
    under_way = [dist.broadcast(tensor, group=world.group, group_src=0, async_op=True) for tensor in tensors]
    for work in under_way:
        work.wait()  # type: ignore[union-attr]  # this rank is in the group


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have DDP choose its buckets now, by the order of the parameters, and not after the first step by its backward.

    In which order the ranks' gradients are added depends on where they lie in a bucket. A run that goes on from a
    checkpoint would add those of its first step in another order than the run that was never broken.
    """
    wrapped.reducer._push_all_rebuilt_params()
    if not wrapped.reducer._rebuild_buckets():
        raise AssertionError("DDP has not settled its buckets")


def _sum_bucket(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
