"""transformers' TrainingArguments, as `to_json_string` writes them, as a run file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bigtrain.convert.found import FormError, Found, is_number, read_as

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
_OPTIMIZERS = {
    "sgd": "sgd",
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
}
# Keys that say the same thing in a run file, and how their values are read.
_SAME: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "run_name": ("run.name", str),
    "output_dir": ("run.dir", str),
    "seed": ("run.seed", int),
    "full_determinism": ("run.deterministic", bool),
    "learning_rate": ("optim.lr", float),
    "weight_decay": ("optim.weight_decay", float),
    "adam_epsilon": ("optim.args.eps", float),
    "dataloader_num_workers": ("data.workers", int),
    "save_total_limit": ("checkpoint.keep", int),
}
# Defaults of transformers that are not ours, for a file that holds what was changed only.
_THEIR_DEFAULTS = {"learning_rate": 5e-5, "weight_decay": 0.0}
_BETAS = {"adam_beta1": 0.9, "adam_beta2": 0.999}
_BEST = "checkpoint.keep_best keeps the best one, by the metric that it names"
_REASONS = {
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "lr_scheduler_kwargs": "give what they say as keys of optim.schedule",
    "optim_args": "give what they say as optim.args",
    "fsdp_config": "give what it says as keys of engine.fsdp, and as activation_checkpointing",
}
# Keys whose meaning is read elsewhere below, or which change nothing.
_READ = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_grad_norm", "bf16", "fp16", "logging_steps",
    "logging_strategy", "eval_strategy", "evaluation_strategy", "eval_steps", "save_strategy", "save_steps",
    "optim", "gradient_checkpointing", "activation_checkpointing", "activation_checkpointing_kwargs",
    "torch_compile", "report_to", "adam_beta1", "adam_beta2", "deepspeed", "fsdp", "use_cpu",
    "label_smoothing_factor", "do_train", "do_eval", "do_predict", "local_rank", "log_level", "log_level_replica",
    "logging_dir", "disable_tqdm", "per_device_eval_batch_size", "eval_batch_size", "train_batch_size",
    "data_seed", "no_cuda", "overwrite_output_dir", "accelerator_config",
    "gradient_checkpointing_kwargs", "parallelism_config", "prediction_loss_only", "remove_unused_columns",
    "dataloader_pin_memory", "ddp_timeout", "save_safetensors", "logging_nan_inf_filter",
    "average_tokens_across_devices", "tf32", "include_num_input_tokens_seen", "project",
    "dataloader_persistent_workers", "restore_callback_states_from_checkpoint", "logging_first_step",
    "ddp_backend",
}  # fmt: skip


def from_training_arguments(values: Mapping[str, Any], found: Found, processes: int) -> None:
    """Convert TrainingArguments; batches there are per process, so their number is needed."""
    for key, (ours, read) in _SAME.items():
        value = values.get(key, _THEIR_DEFAULTS.get(key))
        if value is not None and value != "" and not isinstance(value, Mapping):
            found.put(ours, read_as(read, key, value))
    _batches(values, found, processes)
    _length(values, found)
    _optimizer(values, found)
    _schedule(values, found)
    _cadence(values, found)
    _engine(values, found)
    if _number(values, "label_smoothing_factor") > 0:
        found.leave("label_smoothing_factor", "set task: {name: classification, args: {label_smoothing: …}}")
    for key, value in values.items():
        if key in _READ or key in _SAME or key.startswith(("hub_", "push_to_hub")):
            continue
        if value not in (None, False, "", 0, 0.0, -1, [], {}, "no", "none", "None", "auto", "length"):
            found.leave(key, _REASONS.get(key, "nothing here does that"))
    if values.get("push_to_hub"):
        found.leave("push_to_hub", "nothing is uploaded")


def _number(values: Mapping[str, Any], key: str, default: float = 0) -> float:
    """The number of a key, or what stands for one that is not there or 0."""
    value = read_as(float, key, values.get(key) or default)
    if not is_number(value):
        raise FormError(key, value, "number that counts")
    return value


def _batches(values: Mapping[str, Any], found: Found, processes: int) -> None:
    each = int(_number(values, "per_device_train_batch_size", 8))
    times = int(_number(values, "gradient_accumulation_steps", 1))
    found.put("data.batch_size", each * times * processes)
    if times > 1:
        found.put("train.micro_batch_size", each)
    found.notes.append(
        f"data.batch_size is {each} samples × {times} of accumulation × {processes} processes: of all together."
    )


def _length(values: Mapping[str, Any], found: Found) -> None:
    steps, epochs = values.get("max_steps"), values.get("num_train_epochs", 3)
    if is_number(steps) and steps > 0:
        found.put("train.steps", int(steps))
    elif is_number(epochs) and epochs > 0:
        found.put("train.epochs", math.ceil(epochs))
        if epochs != math.ceil(epochs):
            found.notes.append(f"num_train_epochs was {epochs}: epochs are whole here; train.steps can say it exactly.")


def _optimizer(values: Mapping[str, Any], found: Found) -> None:
    name = str(values.get("optim") or "adamw_torch").removeprefix("OptimizerNames.").lower()
    found.put("optim.name", _OPTIMIZERS.get(name, "adamw"))
    if name not in _OPTIMIZERS:
        found.leave("optim", f"there is no {name}: optim.name is adamw, or give pkg.mod:Class")
    if found.get("optim.name") == "adamw":
        if any(values.get(key) is not None for key in _BETAS):
            found.put("optim.args.betas", [_number(values, key, default) for key, default in _BETAS.items()])
    elif found.get("optim.args.eps") is not None:
        found.values["optim"]["args"].pop("eps")
    clip = values.get("max_grad_norm", 1.0)
    found.put("optim.clip_grad_norm", read_as(float, "max_grad_norm", clip) if clip else None)


def _schedule(values: Mapping[str, Any], found: Found) -> None:
    name = str(values.get("lr_scheduler_type") or "linear").removeprefix("SchedulerType.").lower()
    if name not in _SCHEDULES:
        found.leave("lr_scheduler_type", f"there is no {name}: optim.schedule is cosine")
    found.put("optim.schedule.name", _SCHEDULES.get(name, "cosine"))
    warmup, ratio = _number(values, "warmup_steps"), _number(values, "warmup_ratio")
    if 0 < warmup < 1:  # newer versions write the share there
        warmup, ratio = 0, warmup
    if warmup:
        found.put("optim.schedule.warmup_steps", int(warmup))
    elif ratio:
        steps = found.get("train.steps")
        if steps:
            found.put("optim.schedule.warmup_steps", math.ceil(steps * ratio))
        else:
            found.leave("warmup_ratio", f"set optim.schedule.warmup_steps to {ratio:g} of all steps")


def _cadence(values: Mapping[str, Any], found: Found) -> None:
    if (every := _steps(values, found, "logging_steps")) is not None:
        found.put("track.log_every", every)
    when = str(values.get("eval_strategy") or values.get("evaluation_strategy") or "no").rpartition(".")[2].lower()
    if when == "steps":
        key = "eval_steps" if values.get("eval_steps") else "logging_steps"
        if (every := _steps(values, found, key, 500)) is not None:
            found.put("eval.every_steps", every)
    elif when == "no":
        found.put("eval.every_epochs", None)
    when = str(values.get("save_strategy") or "steps").rpartition(".")[2].lower()
    if when == "steps" and (every := _steps(values, found, "save_steps", 500)) is not None:
        found.put("checkpoint.every_steps", every)
    elif when == "epoch":
        found.leave("save_strategy", "set checkpoint.every_steps to the steps of an epoch")
    reports = values.get("report_to") or []
    reports = [reports] if isinstance(reports, str) else reports
    if not isinstance(reports, list):
        raise FormError("report_to", reports, "list of names")
    if "tensorboard" in reports:
        found.put("track.tensorboard", True)
    if reports and "wandb" not in reports and "all" not in reports:
        found.put("track.wandb", "disabled")
    for name in reports:
        if name not in ("wandb", "tensorboard", "all", "none"):
            found.leave("report_to", f"there is no tracker {name}; track.trackers takes one of your own")


def _steps(values: Mapping[str, Any], found: Found, key: str, default: float = 0) -> int | None:
    """A number of steps, which may be said as a share of all of them; None where it says none."""
    every, total = _number(values, key, default), found.get("train.steps")
    if every <= 0 or (every < 1 and total is None):
        if every > 0:
            found.leave(key, f"it is {every:g} of all steps, whose number the file does not say: give it in steps")
        return None
    return int(every) if every >= 1 else math.ceil(every * total)


def _engine(values: Mapping[str, Any], found: Found) -> None:
    if values.get("bf16") or values.get("fp16"):
        found.put("precision", "bf16")
    if values.get("fp16"):
        found.leave("fp16", "float16 needs loss scaling, which is not there: precision is bf16 instead")
    if values.get("gradient_checkpointing") or values.get("activation_checkpointing"):
        found.put("activation_checkpointing", "full")
    if values.get("torch_compile"):
        found.put("compile", "model")
    if values.get("use_cpu") or values.get("no_cuda"):
        found.put("engine.device", "cpu")
    if values.get("deepspeed"):
        found.put("engine.name", "deepspeed")
        found.leave("deepspeed", "convert that file itself, and put both together")
    elif values.get("fsdp"):
        _fsdp(str(values["fsdp"]).lower(), found)


def _fsdp(said: str, found: Found) -> None:
    """What stands in `fsdp`: words in a text or a list, or, in newer versions, that it is wanted."""
    found.put("engine.name", "fsdp")
    if "offload" in said:
        found.put("engine.fsdp.cpu_offload", True)
    if "shard_grad_op" in said or "zero2" in said:
        found.put("engine.fsdp.reshard_after_forward", False)
    if "hybrid" in said:
        found.leave("fsdp", "set engine.fsdp.shard_size to the processes of one machine")
    if "no_shard" in said:
        found.put("engine.name", "ddp")
