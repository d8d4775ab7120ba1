"""DeepSpeed's own configuration out of the run file's, and what cannot be had, refused before anything starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any

import torch
from torch import nn

from bigtrain.config import combinations
from bigtrain.engines.base import Choices
from bigtrain.errors import CombinationError, SetupError
from bigtrain.moments import Bf16Adam, Bf16AdamW, Bf16Moments
from bigtrain.optim import OptimizerPlan
from bigtrain.prepare import has_compiler

# Earlier versions fail in backward where stage 3 meets frozen parameters and activation checkpointing.
_OLDEST = (0, 19, 3)

_ADAMS = (torch.optim.Adam, torch.optim.AdamW, Bf16Adam, Bf16AdamW)


def build_config(choices: Choices) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Raises:
        CombinationError: Where `extra` says what the run file says elsewhere, or what cannot be.
    """
    zero = choices.zero
    combinations.refuse(combinations.of_extra(zero.extra))
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 3:
        section["memory_efficient_linear"] = False
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_params:
        section["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        # The loop makes the microbatches and says which is the last: to DeepSpeed each is a batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        # In stage 0 the gradients are ours to clip.
        "gradient_clipping": (choices.clip_grad_norm or 0.0) if zero.stage else 0.0,
    }
    if zero.stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if choices.compute_dtype is not None:
        config |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    extra = dict(zero.extra)
    section |= extra.pop("zero_optimization", {})
    return {**config, **extra, "zero_optimization": section}


def check(model: nn.Module, plan: OptimizerPlan, choices: Choices) -> None:
    """Refuse what DeepSpeed cannot do, with its reason.

    Raises:
        SetupError: Where DeepSpeed or a compiler is missing.
        CombinationError: Naming the keys that do not go together.
    """
    _check_version(model, choices)
    zero, stage = choices.zero, choices.zero.stage
    combinations.refuse(
        combinations.of_offloading(
            stage,
            optimizer=zero.offload_optimizer,
            params=zero.offload_params,
            updates_by=None if plan.cls in _ADAMS else plan.cls.__name__,
            args=plan.args,
            has_bf16_moments=issubclass(plan.cls, Bf16Moments),
        )
    )
    if zero.offload_optimizer and not has_compiler():
        raise SetupError(
            "DeepSpeed compiles its Adam for the host, and there is no C++ compiler",
            where="engine.deepspeed.offload_optimizer",
            remedy="install one (apt install g++), or set engine.deepspeed.offload_optimizer=none",
        )
    is_fp64 = any(p.dtype == torch.float64 for p in model.parameters())
    combinations.refuse(combinations.of_precision(stage, is_bf16=choices.compute_dtype is not None, is_fp64=is_fp64))
    if stage == 0:
        return
    empty = [name for name, p in model.named_parameters() if not p.numel()]
    if stage == 3 and empty:
        raise CombinationError(
            f"DeepSpeed's stage 3 cannot gather parameters without elements: {', '.join(empty[:3])}",
            where="engine.deepspeed.stage",
            remedy="set engine.deepspeed.stage=2, or take them out of the model",
        )
    if not plan.elementwise:
        raise CombinationError(
            f"DeepSpeed's stage {stage} updates flat slices, and {plan.cls.__name__} may need whole parameters",
            where="optim.name",
            remedy="set engine.name=ddp; or, where the update of an element depends on that element alone,\n"
            f"say so by a class attribute, {plan.cls.__name__}.elementwise = True",
        )


def _check_version(model: nn.Module, choices: Choices) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise SetupError(
            "DeepSpeed is not installed",
            where="engine.name",
            remedy='pip install "bigtrain[deepspeed]"; or set engine.name=fsdp, which cuts up the same things',
        )
    version = importlib.metadata.version("deepspeed")
    is_old = tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < _OLDEST
    has_frozen = any(not p.requires_grad for p in model.parameters())
    if is_old and choices.zero.stage == 3 and has_frozen and choices.recomputes:
        raise CombinationError(
            f"DeepSpeed {version} fails where stage 3 meets frozen parameters and activation checkpointing",
            where="engine.deepspeed.stage",
            remedy='pip install -U "deepspeed>=0.19.3"; or set activation_checkpointing=none, or another stage',
        )
