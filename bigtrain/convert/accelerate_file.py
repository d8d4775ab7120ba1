"""An Accelerate configuration (https://huggingface.co/docs/accelerate/package_reference/cli) as a run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.convert.found import Found, read_as, section

_ENGINES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
_MACHINE = "the launcher finds it out, or the scheduler says it"
_NO_MEANING = {
    "compute_environment": "clusters are chosen by launch.target",
    "machine_rank": _MACHINE,
    "main_process_ip": _MACHINE,
    "main_process_port": _MACHINE,
    "main_training_function": "a run file needs none",
    "rdzv_backend": _MACHINE,
    "same_network": _MACHINE,
    "gpu_ids": "set CUDA_VISIBLE_DEVICES",
    "enable_cpu_affinity": "set it where the processes are started",
}
_BLOCKS = "the model's blocks are found; a model may name them by blocks()"
_FSDP = {
    "fsdp_auto_wrap_policy": _BLOCKS,
    "fsdp_transformer_layer_cls_to_wrap": _BLOCKS,
    "fsdp_min_num_params": _BLOCKS,
    "fsdp_backward_prefetch": "FSDP2 prefetches by itself",
    "fsdp_backward_prefetch_policy": "FSDP2 prefetches by itself",
    "fsdp_forward_prefetch": "FSDP2 prefetches by itself",
    "fsdp_cpu_ram_efficient_loading": "models are never whole on every rank where they can be filled in pieces",
    "fsdp_sync_module_states": "initial values are the same on all ranks",
    "fsdp_use_orig_params": "FSDP2 always does",
    "fsdp_state_dict_type": "there is one checkpoint format",
    "fsdp_version": "it is FSDP2",
}


def from_accelerate(values: Mapping[str, Any], found: Found, processes: int) -> None:
    """Convert an Accelerate configuration."""
    kind = str(values.get("distributed_type", "NO")).upper()
    if kind not in _ENGINES:
        found.leave("distributed_type", f"there is no engine for {kind}: engine.name is auto")
    found.put("engine.name", _ENGINES.get(kind, "auto"))
    nodes = read_as(int, "num_machines", values.get("num_machines") or 1)
    count = read_as(int, "num_processes", values.get("num_processes") or processes)
    found.put("launch.nproc", max(count // nodes, 1))
    if nodes > 1:
        found.put("launch.nodes", nodes)
        found.put("launch.target", "slurm")
        found.notes.append("Several nodes are started through SLURM; launch.profile names a cluster's settings.")
    if values.get("use_cpu"):
        found.put("engine.device", "cpu")
    precision = str(values.get("mixed_precision", "no")).lower()
    if precision in ("bf16", "fp16"):
        found.put("precision", "bf16")
    if precision in ("fp16", "fp8"):
        found.leave(
            "mixed_precision", f"{precision} is not there: " + ("bf16 instead" if precision == "fp16" else "fp32")
        )
    _fsdp(section(values, "fsdp_config"), found)
    _deepspeed(section(values, "deepspeed_config"), found)
    dynamo = section(values, "dynamo_config")
    if str(dynamo.get("dynamo_backend", "NO")).upper() != "NO":
        found.put("compile", "model")
    known = {"distributed_type", "num_machines", "num_processes", "use_cpu", "mixed_precision", "downcast_bf16"}
    for key, value in values.items():
        if key in _NO_MEANING:
            found.leave(key, _NO_MEANING[key])
        elif key not in known and not key.endswith("_config") and value not in (None, False, "no", "NO"):
            found.leave(key, "nothing here does that")
    for key in ("megatron_lm_config", "tpu_config", "ipex_config", "fp8_config", "parallelism_config"):
        if values.get(key):
            found.leave(key, "nothing here does that")


def _fsdp(fsdp: Mapping[str, Any], found: Found) -> None:
    for key, value in fsdp.items():
        if key == "fsdp_reshard_after_forward" and isinstance(value, bool):
            found.put("engine.fsdp.reshard_after_forward", value)
        elif key in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
            _strategy(str(value), found)
        elif key == "fsdp_offload_params":
            found.put("engine.fsdp.cpu_offload", bool(value))
        elif key == "fsdp_activation_checkpointing":
            found.put("activation_checkpointing", "full" if value else "none")
        elif value not in (None, False, ""):
            found.leave(f"fsdp_config.{key}", _FSDP.get(key, "nothing here does that"))


def _strategy(name: str, found: Found) -> None:
    strategies = {
        "1": "FULL_SHARD",
        "2": "SHARD_GRAD_OP",
        "3": "NO_SHARD",
        "4": "HYBRID_SHARD",
        "5": "HYBRID_SHARD_ZERO2",
    }
    name = strategies.get(name, name.upper())
    if name == "NO_SHARD":
        found.put("engine.name", "ddp")
        return
    found.put("engine.fsdp.reshard_after_forward", name in ("FULL_SHARD", "HYBRID_SHARD"))
    if name.startswith("HYBRID"):
        found.leave("fsdp_config.fsdp_sharding_strategy", "set engine.fsdp.shard_size to the processes of one machine")


def _deepspeed(deepspeed: Mapping[str, Any], found: Found) -> None:
    names = {
        "zero_stage": "engine.deepspeed.stage",
        "offload_optimizer_device": "engine.deepspeed.offload_optimizer",
        "offload_param_device": "engine.deepspeed.offload_params",
    }
    for key, value in deepspeed.items():
        if key in names and value in ("cpu", "none", 0, 1, 2, 3):
            if value != "none":
                found.put(names[key], value)
        elif key == "gradient_clipping":
            found.put("optim.clip_grad_norm", read_as(float, key, value))
        elif key == "deepspeed_config_file":
            found.leave(f"deepspeed_config.{key}", f"convert {value} itself, and put both together")
        elif key == "gradient_accumulation_steps":
            found.leave(f"deepspeed_config.{key}", "it follows from data.batch_size and train.micro_batch_size")
        elif value not in (None, False, "none"):
            found.leave(f"deepspeed_config.{key}", "nothing here does that")
