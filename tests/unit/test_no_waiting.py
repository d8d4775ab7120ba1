"""A step on a device never asks for a value: run on the meta device, whose tensors have none to give.

Whatever reads one raises there, as `.item()`, a condition on a tensor or an index by a mask; whatever mixes the host's
tensors in is seen on its way to the kernel. What waits inside a kernel itself only tests/gpu can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.optimizer as optimizers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain import engines, models
from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.engines import Choices
from bigtrain.loop import train_step
from bigtrain.models.blocks import find_blocks
from bigtrain.optim import plan_optimizer
from bigtrain.protocols import Batch, Task
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.regression import Regression

META = torch.device("meta")
SAMPLES, VALID, CONTEXT, VOCAB = 3, 2, 8, 32
GPT = {"vocab": VOCAB, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "context": CONTEXT}


class Watching(TorchDispatchMode):
    """Refuses tensors of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        assert not [value for value in given if isinstance(value, Tensor) and value.device != META], func
        return func(*args, **(kwargs or {}))


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=META)


def language(**extra: Tensor) -> tuple[nn.Module, Task, Any]:
    with META:
        model = models.build("gpt", GPT)
    data = {"tokens": integers(SAMPLES, CONTEXT + 1)}
    task = CausalLM()
    task.check(model, Batch({"tokens": torch.zeros(2, CONTEXT + 1, dtype=torch.int64)}, torch.ones(2), 2))
    return model, task, data | extra


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, outputs)).to(META)


def images() -> Tensor:
    return torch.zeros(SAMPLES, 3, 8, 8, device=META)


def weighted() -> tuple[nn.Module, Task, Any]:
    task = Classification(class_weights=[1.0, 2.0, 3.0], label_smoothing=0.1, ignore_index=1)
    task._weights = torch.ones(3, device=META)  # copied to the device once, in the first step
    return network(3), task, (images(), integers(SAMPLES))


CASES: dict[str, Callable[[], tuple[nn.Module, Task, Any]]] = {
    "tokens": language,
    "documents": lambda: language(documents=integers(SAMPLES, CONTEXT + 1)),
    "targets": lambda: language(targets=integers(SAMPLES, CONTEXT)),
    "labels": lambda: (network(3), Classification(), (images(), integers(SAMPLES))),
    "weighted labels": weighted,
    "numbers": lambda: (network(1), Regression(), (images(), torch.zeros(SAMPLES, device=META))),
}


@pytest.mark.parametrize(
    "optimizer",  # sgd has no meta kernel
    [{"name": "adam"}, {"name": "adamw"}, {"name": "adamw", "moments": "bf16", "args": {"betas": [0.9, 0.95]}}],
    ids=["adam", "adamw", "moments in bf16"],
)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_no_value(
    case: str, compute: torch.dtype | None, optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch lets its fused kernels run on; their shapes are known on the meta device as well.
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cuda", "meta"])
    model, task, data = CASES[case]()
    plan = plan_optimizer(model, schema.Optim.model_validate(optimizer))
    choices = Choices(clip_grad_norm=1.0, compute_dtype=compute)
    blocks = [block for _, block in find_blocks(model)]
    engine = engines.build("single", model, blocks, plan, World(device=META), choices)
    full = Batch(data, torch.ones(SAMPLES, device=META), SAMPLES, range(SAMPLES))
    padded = Batch(data, torch.ones(SAMPLES, device=META), VALID, range(SAMPLES))
    with Watching():
        for _ in range(2):
            result = train_step(engine, task, [full, padded], 0.5)
    assert [value.shape for value in result] == [()] * 3
    assert all(value.device == META for value in result)


def test_what_watches_sees_what_waits() -> None:
    x = torch.zeros(3, device=META)
    with Watching():
        with pytest.raises(AssertionError):
            x + torch.ones(3)
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            bool(x.sum() > 0)
        with pytest.raises((RuntimeError, NotImplementedError)):
            x[x > 0]
