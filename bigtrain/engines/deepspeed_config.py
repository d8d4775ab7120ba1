"""DeepSpeed's own configuration out of the run file's, and what cannot be had, refused before anything starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bigtrain.engines.base import Choices, Zero
from bigtrain.errors import CombinationError, SetupError
from bigtrain.optim import OptimizerPlan
from bigtrain.prepare import has_compiler

# Earlier versions fail in backward where stage 3 meets frozen parameters and activation checkpointing.
_OLDEST = (0, 19, 3)

# Keys of DeepSpeed's that say what a key of the run file says already.
_OURS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "zero_optimization.stage": "engine.deepspeed.stage",
    "zero_optimization.offload_optimizer": "engine.deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "engine.deepspeed.offload_params",
    "wandb": "track.wandb",
    "tensorboard": "track.tensorboard",
}

# What would make the numbers others than under the other engines, or the state unreadable.
_REFUSED = {
    "zero_optimization.round_robin_gradients": "the masters then do not lie where DeepSpeed says they do",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear in the whole process, for good",
    "zero_optimization.zero_quantized_weights": "the weights that are computed with would be others",
    "zero_optimization.zero_quantized_gradients": "the gradients would be others",
    "gradient_allreduce_op": "gradients are summed, and divided by the targets of the global batch",
    "prescale_gradients": "gradients are summed, and divided by the targets of the global batch",
    "gradient_predivide_factor": "gradients are summed, and divided by the targets of the global batch",
    "sparse_gradients": "it leaves the sum of the gradients to an operation that takes means",
    "managed_gradient_accumulation": "the loop says where a step ends",
    "zero_allow_untested_optimizer": "which optimizers serve is checked by what they need",
}


def build_config(choices: Choices) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Raises:
        CombinationError: Where `extra` says what the run file says elsewhere, or what cannot be.
    """
    zero = choices.zero
    _refuse_conflicts(zero.extra)
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


def _refuse_conflicts(extra: Mapping[str, Any]) -> None:
    inner = extra.get("zero_optimization", {})
    if not isinstance(inner, Mapping):
        raise CombinationError(
            f"zero_optimization is {inner!r}, not a section",
            where="engine.deepspeed.extra",
            remedy="write its keys below it: extra: {zero_optimization: {reduce_bucket_size: 500000000}}",
        )
    for key in [*extra, *(f"zero_optimization.{name}" for name in inner)]:
        if key in _OURS:
            raise CombinationError(
                f"engine.deepspeed.extra sets {key}, which {_OURS[key]} of the run file says already",
                where=f"engine.deepspeed.extra.{key}",
                remedy=f"take it out, and set {_OURS[key]}",
            )
        if key in _REFUSED:
            raise CombinationError(
                f"engine.deepspeed.extra sets {key}: {_REFUSED[key]}",
                where=f"engine.deepspeed.extra.{key}",
                remedy="take it out",
            )


def check(model: nn.Module, plan: OptimizerPlan, choices: Choices) -> None:
    """Refuse what DeepSpeed cannot do, with its reason.

    Raises:
        SetupError: Where DeepSpeed or a compiler is missing.
        CombinationError: Naming the keys that do not go together.
    """
    _check_version(model, choices)
    _check_offload(plan, choices.zero)
    stage = choices.zero.stage
    if stage == 0 and choices.compute_dtype is not None:
        raise CombinationError(
            "DeepSpeed's stage 0 does not add up bf16 gradients in float32",
            where="engine.deepspeed.stage",
            remedy="set engine.name=ddp, which does the same work; or a stage from 1 to 3",
        )
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise CombinationError(
            "DeepSpeed reduces no gradients of float64, and keeps its master weights in float32",
            where="precision",
            remedy="set precision=fp32; or engine.name=fsdp, which computes in fp64 as well",
        )
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


def _check_offload(plan: OptimizerPlan, zero: Zero) -> None:
    if zero.offload_params and zero.stage != 3:
        raise CombinationError(
            f"offload_params needs stage 3, which cuts up the weights, and the stage is {zero.stage}",
            where="engine.deepspeed.offload_params",
            remedy="set engine.deepspeed.stage=3, or engine.deepspeed.offload_params=none",
        )
    if not zero.offload_optimizer:
        return
    if zero.stage == 0:
        raise CombinationError(
            "offload_optimizer needs a stage from 1 to 3, and the stage is 0",
            where="engine.deepspeed.offload_optimizer",
            remedy="set engine.deepspeed.stage=2, or engine.deepspeed.offload_optimizer=none",
        )
    if plan.cls not in (torch.optim.Adam, torch.optim.AdamW):
        raise CombinationError(
            f"DeepSpeed updates on the host by its own Adam, and the optimizer is {plan.cls.__name__}",
            where="engine.deepspeed.offload_optimizer",
            remedy="set optim.name to adam or adamw, or engine.deepspeed.offload_optimizer=none",
        )
    unknown = sorted(key for key in ("amsgrad", "maximize") if plan.args.get(key))
    if unknown:
        raise CombinationError(
            f"DeepSpeed's Adam for the host knows no {unknown[0]}",
            where=f"optim.args.{unknown[0]}",
            remedy="take it out, or set engine.deepspeed.offload_optimizer=none",
        )
    if not has_compiler():
        raise SetupError(
            "DeepSpeed compiles its Adam for the host, and there is no C++ compiler",
            where="engine.deepspeed.offload_optimizer",
            remedy="install one (apt install g++), or set engine.deepspeed.offload_optimizer=none",
        )
