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
        wrapped = DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            process_group=world.group,
            gradient_as_bucket_view=True,
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
        self._world.all_reduce(sums[1:])
        return sums


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have DDP choose its buckets now, by the order of the parameters, and not after the first step by its backward.

    In which order the ranks' gradients are added depends on where they lie in a bucket. A run that goes on from a
    checkpoint would add those of its first step in another order than the run that was never broken. So one backward
    pass of zeros is sent through the buckets, after which DDP settles them for good.
    """
    trained = [p for p in wrapped.module.parameters() if p.requires_grad]
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    zeros = [(p * 0).sum().float() for p in trained]  # autograd runs what was built last first
    torch.autograd.backward(torch.stack([zero.to(zeros[0].device) for zero in zeros]).sum())
    wrapped.reducer._rebuild_buckets()
    for p in trained:
        p.grad = None


def _sum_bucket(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
