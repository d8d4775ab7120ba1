"""A DeepSpeed configuration (https://www.deepspeed.ai/docs/config-json) as a run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.config.combinations import OURS, REFUSED
from bigtrain.convert.found import Found, is_number, read_as, section

_AUTO = "auto is filled in by transformers; give the value itself"
_ADAM = ("adam", "adamw", "fusedadam", "deepspeedcpuadam")
_OPTIMIZERS = {**dict.fromkeys(_ADAM, "adamw"), "sgd": "sgd"}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SECTIONS = ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "activation_checkpointing")
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NO_MEANING = {
    "steps_per_print": "track.log_every decides what is logged",
    "wall_clock_breakdown": "time by part is always logged; profile.steps tells more",
    "zero_allow_untested_optimizer": "every optimizer here was tested with ZeRO",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's",
}
_CONVERTED = (*_SECTIONS, *_BATCHES, "gradient_clipping")
_ZERO_OWN = ("stage", "offload_optimizer", "offload_param")


def from_deepspeed(values: Mapping[str, Any], found: Found, processes: int) -> None:
    """Convert a DeepSpeed configuration."""
    found.put("engine.name", "deepspeed")
    _batches(values, found, processes)
    _zero(section(values, "zero_optimization"), found)
    _optimizer(section(values, "optimizer"), found)
    _schedule(section(values, "scheduler"), found)
    clip = values.get("gradient_clipping")
    if clip == "auto":
        found.leave("gradient_clipping", _AUTO)
    else:
        found.put("optim.clip_grad_norm", read_as(float, "gradient_clipping", clip) if clip else None)
    if _enabled(values.get("fp16")):
        found.leave("fp16", "float16 needs loss scaling, which is not there: precision is bf16 instead")
    if _enabled(values.get("bf16")) or _enabled(values.get("fp16")):
        found.put("precision", "bf16")
    if values.get("activation_checkpointing"):
        found.leave("activation_checkpointing", "set activation_checkpointing: full, which is torch's own")
    for key, value in values.items():
        if key in _NO_MEANING:
            found.leave(key, _NO_MEANING[key])
        elif key in ("tensorboard", "wandb"):
            _tracker(key, section(values, key), found)
        elif key in OURS.keys() | REFUSED.keys() and key not in _CONVERTED:
            found.leave(key, _why_not(key))
        elif key not in _CONVERTED:
            found.values["engine"].setdefault("deepspeed", {}).setdefault("extra", {})[key] = value


def _why_not(key: str) -> str:
    """Why a key cannot be handed on to DeepSpeed."""
    return f"{OURS[key]} says it here" if key in OURS else REFUSED[key]


def _tracker(key: str, asked: Mapping[str, Any], found: Found) -> None:
    """What DeepSpeed itself would log to; there is one that logs everything."""
    if not _enabled(asked):
        return
    if key == "tensorboard":
        found.put("track.tensorboard", True)
    for theirs, ours in (("project", "project"), ("team", "entity"), ("group", "group")):
        if key == "wandb" and asked.get(theirs):
            found.put(f"track.wandb.{ours}", asked[theirs])
    for other in asked.keys() - {"enabled", "project", "team", "group"}:
        found.leave(f"{key}.{other}", "it lies in the run folder, under the run's name")


def _enabled(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("enabled") in (True, "auto")


def _batches(values: Mapping[str, Any], found: Found, processes: int) -> None:
    whole, micro, accumulation = (values.get(key) for key in _BATCHES)
    for key in _BATCHES:
        if values.get(key) == "auto":
            found.leave(key, _AUTO)
    if is_number(micro):
        found.put("train.micro_batch_size", micro)
    if is_number(whole):
        found.put("data.batch_size", whole)
    elif is_number(micro):
        times = accumulation if is_number(accumulation) else 1
        found.put("data.batch_size", micro * times * processes)
        found.notes.append(
            f"data.batch_size is {micro} samples × {times} of accumulation × {processes} processes: of all together."
        )
    if is_number(accumulation):
        found.notes.append("Accumulation follows from data.batch_size, train.micro_batch_size and the processes.")


def _zero(zero: Mapping[str, Any], found: Found) -> None:
    found.put("engine.deepspeed.stage", zero.get("stage", 0))
    for key, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_params")):
        offload = section(zero, key)
        device = offload.get("device", "none")
        if device == "cpu":
            found.put(f"engine.deepspeed.{ours}", "cpu")
        elif device != "none":
            found.leave(f"zero_optimization.{key}.device", f"{device} is not supported, cpu is")
        for other in offload.keys() - {"device"}:
            found.leave(f"zero_optimization.{key}.{other}", "DeepSpeed's default is taken")
    extra = {key: value for key, value in zero.items() if key not in _ZERO_OWN and value != "auto"}
    for key, value in zero.items():
        if value == "auto":
            found.leave(f"zero_optimization.{key}", _AUTO)
        elif (whole := f"zero_optimization.{key}") in REFUSED:
            found.leave(whole, _why_not(whole))
            extra.pop(key)
    if "stage3_gather_16bit_weights_on_model_save" in extra:
        extra.pop("stage3_gather_16bit_weights_on_model_save")
        found.leave("zero_optimization.stage3_gather_16bit_weights_on_model_save", "checkpoints fit every engine")
    if extra:
        found.put("engine.deepspeed.extra", {"zero_optimization": extra})


def _optimizer(optimizer: Mapping[str, Any], found: Found) -> None:
    if not optimizer:
        return
    kind, params = str(optimizer.get("type", "")).lower(), dict(section(optimizer, "params"))
    name = _OPTIMIZERS.get(kind)
    if name is None:
        found.leave("optimizer.type", f"there is no {optimizer.get('type')}: optim.name is adamw")
    if kind in _ADAM:
        params.pop("torch_adam", None)  # whose kernels are used
        if not params.pop("adam_w_mode", True) and kind != "adamw":  # DeepSpeed takes an Adam for an AdamW by itself
            name = "adam"
    found.put("optim.name", name or "adamw")
    for key, ours in (("lr", "optim.lr"), ("weight_decay", "optim.weight_decay")):
        value = params.pop(key, None)
        if is_number(value):
            found.put(ours, float(value))
        elif value is not None:
            found.leave(f"optimizer.params.{key}", _AUTO)
        elif key == "weight_decay":
            found.put(ours, 0.0)  # DeepSpeed's default, which is not ours
    for key in ("betas", "eps", "momentum", "nesterov"):
        value = params.pop(key, None)
        if value == "auto":
            found.leave(f"optimizer.params.{key}", _AUTO)
        elif value is not None:
            found.put(f"optim.args.{key}", value)
    for key in params:
        found.leave(f"optimizer.params.{key}", "torch's optimizer has no such argument")


def _schedule(scheduler: Mapping[str, Any], found: Found) -> None:
    if not scheduler:
        return
    kind, params = str(scheduler.get("type")), dict(section(scheduler, "params"))
    if kind not in _SCHEDULES:
        found.leave("scheduler.type", f"there is no {kind}; the shapes are constant, step, linear, cosine and wsd")
        return
    found.put("optim.schedule.name", _SCHEDULES[kind])
    warmup = params.pop("warmup_num_steps", None)
    if is_number(warmup):
        found.put("optim.schedule.warmup_steps", warmup)
    elif warmup is not None:
        found.leave("scheduler.params.warmup_num_steps", _AUTO)
    total = params.pop("total_num_steps", None)
    if is_number(total):
        found.put("train.steps", total)
    elif total is not None:
        found.leave("scheduler.params.total_num_steps", _AUTO)
    peak = params.pop("warmup_max_lr", None)
    if is_number(peak):
        found.put("optim.lr", float(peak))
    least = params.pop("cos_min_ratio", None)
    if is_number(least):
        found.put("optim.schedule.min_factor", float(least))
    if warmup and params.pop("warmup_type", "log") == "log":
        found.leave("scheduler.params.warmup_type", "DeepSpeed's default is logarithmic; the warm-up here is linear")
    for key, value in params.items():
        if value not in (0, 0.0, "auto"):
            found.leave(f"scheduler.params.{key}", "the warm-up rises linearly from the first step's share")
