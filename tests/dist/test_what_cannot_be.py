"""What docs/engines.md says cannot be had together fails in the libraries themselves, without any code of ours.

The day one of these passes, its refusal can go. What DeepSpeed alone cannot do is in test_deepspeed.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.distributed import run_distributed

LR, DECAY = 0.1, 0.5
LINEAR = F.linear


class Idle(nn.Module):
    """A layer that takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def failure_of(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def batchnorm_over_a_part() -> float:
    """How far the summed gradient of two halves of a batch is from that of the whole."""
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def gradient(part: Tensor) -> Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model(part).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    summed = gradient(inputs.chunk(2)[dist.get_rank()])
    dist.all_reduce(summed)
    whole = gradient(inputs)
    return float((summed - whole).norm() / whole.norm())


def ddp_with_an_idle_layer() -> None:
    model = DistributedDataParallel(Idle())
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()


def offload_from_a_cpu() -> None:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), offload_policy=CPUOffloadPolicy())
    model(torch.randn(2, 4)).sum().backward()


def initialize(model: nn.Module, zero: dict[str, Any], **config: Any) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        config["zero_allow_untested_optimizer"] = True
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def deepspeed_with_an_idle_layer(stage: int) -> float:
    """By what share a step moves a layer that has no gradient; plain torch leaves it alone."""
    import deepspeed

    model = Idle()
    before = model.idle.weight.detach().clone()
    engine = initialize(model, {"stage": stage})
    engine.backward(engine(torch.randn(2, 4)).sum())
    engine.step()
    with deepspeed.zero.GatheredParameters([model.idle.weight], enabled=stage == 3):
        return float((model.idle.weight - before).norm() / before.norm())


def weights_on_the_host_in_stage_2() -> bool:
    engine = initialize(Idle(), {"stage": 2, "offload_param": {"device": "cpu"}})
    return any(hasattr(p, "ds_id") for p in engine.module.parameters()) or bool(engine.optimizer.cpu_offload)


def memory_efficient_linear() -> bool:
    """Whether torch's own function is another now: stage 3 replaces it unless it is told not to."""
    return F.linear is not LINEAR


def adam_on_the_host(**options: Any) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([nn.Parameter(torch.ones(2))], **options)


def every_case() -> dict[str, Any]:
    return {
        "batchnorm": batchnorm_over_a_part(),
        "ddp, idle": failure_of(ddp_with_an_idle_layer),
        "fsdp, offload": failure_of(offload_from_a_cpu),
        "deepspeed, idle": [deepspeed_with_an_idle_layer(stage) for stage in (1, 2, 3)],
        "weights on the host": weights_on_the_host_in_stage_2(),
        "amsgrad": failure_of(lambda: adam_on_the_host(amsgrad=True)),
        "maximize": failure_of(lambda: adam_on_the_host(maximize=True)),
        "sparse": failure_of(lambda: initialize(Idle(), {"stage": 0}, sparse_gradients=True)),
        "linear": memory_efficient_linear(),
    }


@pytest.mark.slow
def test_it_fails_underneath() -> None:
    for found in run_distributed(every_case, 2):
        assert found["batchnorm"] > 0.01
        assert "Expected to have finished reduction in the prior iteration" in found["ddp, idle"]
        assert "no NVIDIA driver" in found["fsdp, offload"]
        assert found["deepspeed, idle"] == pytest.approx([LR * DECAY] * 3, rel=1e-4)
        assert not found["weights on the host"]  # the key is left aside without a word
        assert "does not support the AMSGrad variant" in found["amsgrad"]
        assert "unexpected keyword argument 'maximize'" in found["maximize"]
        assert "DeepSpeedConfigError: Sparse compression" in found["sparse"]
        assert found["linear"]  # torch's own, for whoever comes next in the process
