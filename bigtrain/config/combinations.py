"""What cannot be had together, as far as plain values tell: one rule each, asked for run files and by engines.

A run file is checked before anything starts. An engine asks the same rules with what it was really given, which is
more: the optimizer's class, the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bigtrain import catalogue
from bigtrain.config.fields import Named
from bigtrain.config.schema import Config
from bigtrain.errors import CombinationError


class Clash(NamedTuple):
    """Two choices that cannot work together.

    Attributes:
        text: What cannot be, and why.
        key: The key of the run file to change.
        remedy: How.
    """

    text: str
    key: str
    remedy: str


# Keys of DeepSpeed's that say what a key of the run file says already.
OURS = {
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
REFUSED = {
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


def clashes(config: Config, *, launched: bool) -> Iterator[Clash]:
    """Everything in a run file that cannot work together whatever the model and the data are.

    Args:
        config: The run file.
        launched: Whether it is to be started as its section `launch` says.
    """
    engine, launch = config.engine, config.launch
    processes = launch.nproc * launch.nodes if launched and isinstance(launch.nproc, int) else None
    if launched and launch.target == "local":
        yield from on_this_machine(launch.nodes)
    if engine.name == "single":
        yield from in_one_process(processes or 1)
    if engine.name == "fsdp":
        yield from of_fsdp(
            cpu_offload=engine.fsdp.cpu_offload and engine.device == "cpu",
            shard_size=engine.fsdp.shard_size,
            processes=processes,
        )
    if engine.name == "deepspeed":
        yield from _of_deepspeed(config)
    yield from _of_data(config)
    yield from of_features(config)
    yield from _of_blocks(config)
    yield from of_saving(config)
    yield from of_weights(config)
    yield from of_adapter(config)


def refuse(found: Iterable[Clash]) -> None:
    """Raise the first of them as an error, if there is one.

    Raises:
        CombinationError: Naming the key.
    """
    for clash in found:
        raise CombinationError(clash.text, where=clash.key, remedy=clash.remedy)


def on_this_machine(nodes: int) -> Iterator[Clash]:
    """The target local, and how many nodes are asked for."""
    if nodes > 1:
        yield Clash(
            f"launch.target=local is this machine, and {nodes} nodes are asked for",
            "launch.nodes",
            "set launch.target=slurm, or launch.nodes=1",
        )


def in_one_process(processes: int) -> Iterator[Clash]:
    """The engine single, and how many processes there are."""
    if processes > 1:
        yield Clash(
            f"the engine single runs in one process, and there are {processes}",
            "engine.name",
            "set engine.name to ddp, fsdp or auto, or launch.nproc to 1",
        )


def of_fsdp(*, cpu_offload: bool, shard_size: int | None, processes: int | None) -> Iterator[Clash]:
    """What the fsdp engine cannot do.

    Args:
        cpu_offload: Whether shards are to be moved to the host that computes, too.
        shard_size: Ranks that share a copy of the model.
        processes: How many there are, where that is known.
    """
    if cpu_offload:
        yield Clash(
            "engine.fsdp.cpu_offload moves shards from a GPU to the host, and this run computes on the host",
            "engine.fsdp.cpu_offload",
            "set it to false, or run on a GPU",
        )
    if shard_size and processes and processes % shard_size:
        yield Clash(
            f"engine.fsdp.shard_size is {shard_size}, which does not divide the {processes} processes",
            "engine.fsdp.shard_size",
            "choose a divisor of the number of processes, or null for all of them",
        )


def of_saving(config: Config) -> Iterator[Clash]:
    """What of the weights is saved, and where the rest is to come from."""
    if config.checkpoint.weights == "trainable" and config.begins_with is None:
        yield Clash(
            "checkpoint.weights=trainable leaves frozen weights in the file that the run began with, and it has none",
            "checkpoint.weights",
            "set it to all, or say what the run begins with (finetune.init_from)",
        )


def of_weights(config: Config) -> Iterator[Clash]:
    """What is said of the file that a run begins with, where it begins with none: it would train from nothing."""
    if config.finetune.init_from is not None or config.model.name.startswith(catalogue.HUGGING_FACE):
        return
    for key in ("new", "remap", "resize", "ignore", "min_coverage"):
        if getattr(config.finetune, key) not in ((), {}, None):
            yield Clash(
                f"finetune.{key} is about the weights that a run begins with, and this one begins with none",
                f"finetune.{key}",
                "say what it begins with (finetune.init_from), or take the key out",
            )


def of_adapter(config: Config) -> Iterator[Clash]:
    """An adapter, and the frozen weights that it stands beside; a factory of the user's own may have read them."""
    if config.finetune.adapter is not None and config.begins_with is None and ":" not in config.model.name:
        yield Clash(
            "an adapter trains beside frozen weights, and the run begins with none: they would stay as they were drawn",
            "finetune.adapter",
            "say what the run begins with (finetune.init_from), or take the adapter out",
        )


def _of_deepspeed(config: Config) -> Iterator[Clash]:
    chosen, optim = config.engine.deepspeed, config.optim
    yield from of_extra(chosen.extra)
    yield from of_precision(chosen.stage, is_bf16=config.precision == "bf16", is_fp64=config.precision == "fp64")
    yield from of_offloading(
        chosen.stage,
        optimizer=chosen.offload_optimizer == "cpu",
        params=chosen.offload_params == "cpu",
        updates_by=None if optim.name in ("adam", "adamw") or ":" in optim.name else optim.name,
        args=optim.args,
        has_bf16_moments=optim.moments == "bf16",
    )


def of_extra(extra: Mapping[str, Any]) -> Iterator[Clash]:
    """Keys of DeepSpeed's own configuration that the run file says elsewhere, or that cannot be had."""
    inner = extra.get("zero_optimization", {})
    place = "engine.deepspeed.extra"
    if not isinstance(inner, Mapping):
        remedy = "write its keys below it: extra: {zero_optimization: {reduce_bucket_size: 500000000}}"
        yield Clash(f"zero_optimization is {inner!r}, not a section", place, remedy)
        inner = {}
    for key in [*extra, *(f"zero_optimization.{name}" for name in inner)]:
        if key in OURS:
            text = f"{place} sets {key}, which {OURS[key]} of the run file says already"
            yield Clash(text, f"{place}.{key}", f"take it out, and set {OURS[key]}")
        if key in REFUSED:
            yield Clash(f"{place} sets {key}: {REFUSED[key]}", f"{place}.{key}", "take it out")


def of_precision(stage: int, *, is_bf16: bool, is_fp64: bool) -> Iterator[Clash]:
    """Numbers that DeepSpeed does not compute with."""
    if stage == 0 and is_bf16:
        yield Clash(
            "DeepSpeed's stage 0 does not add up bf16 gradients in float32",
            "engine.deepspeed.stage",
            "set engine.name=ddp, which does the same work; or a stage from 1 to 3",
        )
    if is_fp64:
        yield Clash(
            "DeepSpeed reduces no gradients of float64, and keeps its master weights in float32",
            "precision",
            "set precision=fp32; or engine.name=fsdp, which computes in fp64 as well",
        )


def of_offloading(
    stage: int,
    *,
    optimizer: bool,
    params: bool,
    updates_by: str | None,
    args: Mapping[str, Any],
    has_bf16_moments: bool,
) -> Iterator[Clash]:
    """What DeepSpeed cannot put on the host.

    Args:
        stage: Its stage.
        optimizer: Whether the optimizer's state is to lie there.
        params: Whether the weights are.
        updates_by: The optimizer, where it is certainly neither Adam nor AdamW.
        args: The optimizer's arguments.
        has_bf16_moments: Whether its moments are to be kept in bfloat16.
    """
    if params and stage != 3:
        yield Clash(
            f"offload_params needs stage 3, which cuts up the weights, and the stage is {stage}",
            "engine.deepspeed.offload_params",
            "set engine.deepspeed.stage=3, or engine.deepspeed.offload_params=none",
        )
    if not optimizer:
        return
    if stage == 0:
        yield Clash(
            "offload_optimizer needs a stage from 1 to 3, and the stage is 0",
            "engine.deepspeed.offload_optimizer",
            "set engine.deepspeed.stage=2, or engine.deepspeed.offload_optimizer=none",
        )
    if updates_by is not None:
        yield Clash(
            f"DeepSpeed updates on the host by its own Adam, and the optimizer is {updates_by}",
            "engine.deepspeed.offload_optimizer",
            "set optim.name to adam or adamw, or engine.deepspeed.offload_optimizer=none",
        )
    if has_bf16_moments:
        yield Clash(
            "DeepSpeed's Adam for the host keeps its moments in float32",
            "optim.moments",
            "set optim.moments=fp32, or engine.deepspeed.offload_optimizer=none",
        )
    for unknown in sorted(key for key in ("amsgrad", "maximize") if args.get(key)):
        yield Clash(
            f"DeepSpeed's Adam for the host knows no {unknown}",
            f"optim.args.{unknown}",
            "take it out, or set engine.deepspeed.offload_optimizer=none",
        )


def of_evaluation(name: str, args: Mapping[str, Any], eval_name: str, eval_args: Mapping[str, Any]) -> Iterator[Clash]:
    """Samples that would be both trained and evaluated on, and sources that have none to evaluate on."""
    if (name, dict(args)) == (eval_name, dict(eval_args)) and name in catalogue.DATA_WITHOUT_SPLITS:
        yield Clash(
            f"evaluation would see the samples of training: both are {name} with the same args",
            "data.eval",
            "give other args, or hold out a share: data.eval: {split: 0.1}",
        )
    if eval_name in catalogue.DATA_FOR_TRAINING_ONLY:
        yield Clash(
            f"{eval_name} has no samples of its own for evaluation",
            "data.eval",
            "hold out a share of them: data.eval: {split: 0.2}",
        )


def of_features(config: Config) -> Iterator[Clash]:
    """Features that are computed once, and what would change them."""
    finetune, key = config.finetune, "finetune.feature_cache"
    if finetune.feature_cache is None:
        return
    if finetune.adapter:
        yield Clash("features of a frozen part are to be kept, and adapters train inside of it", key, "take one out")
    elif not (finetune.freeze or finetune.freeze_depth):
        yield Clash("features of a frozen part are to be kept, and nothing is frozen", key, "set finetune.freeze")
    if config.data.mix:
        text = "features are to be computed once, and data.mix mixes samples anew each time"
        yield Clash(text, key, "take one of them out")
    if config.compile.scope != "none":
        yield Clash(
            "with cached features the head runs alone: there is nothing to compile", "compile", "set it to none"
        )


def _of_data(config: Config) -> Iterator[Clash]:
    data = config.data
    if isinstance(data.eval, Named):
        yield from of_evaluation(data.name, data.args, data.eval.name, data.eval.args)
    goals = {"eval.early_stop": config.eval.early_stop, "checkpoint.keep_best": config.checkpoint.keep_best}
    for key in (key for key, goal in goals.items() if goal and data.eval == "none"):
        text = "evaluations are to be compared, and the run has no data to evaluate on"
        yield Clash(text, key, "hold out a share, data.eval: {split: 0.1}; or take the key out")
    if data.mix and config.task.name in catalogue.TASKS and config.task.name not in catalogue.TASKS_OF_MIXTURES:
        yield from of_mixtures(config.task.name)


def of_mixtures(task: str) -> Iterator[Clash]:
    """Samples that are mixed, and a task that cannot learn from mixtures."""
    yield Clash(
        f"samples and their labels are to be mixed, and the task {task} does not take mixtures",
        "data.mix",
        "take it out; a task of your own that takes batches of bigtrain.data.Mixed says takes_mixtures = True",
    )


def _of_blocks(config: Config) -> Iterator[Clash]:
    """What is done to a model's repeated parts, and models of ours that have none."""
    name = config.model.name
    if name not in catalogue.WITHOUT_BLOCKS:
        return
    no_blocks = f"{name} has no repeated blocks"
    if config.activation_checkpointing != "none":
        yield Clash(
            f"{no_blocks} whose activations could be computed again", "activation_checkpointing", "set it to none"
        )
    if config.compile.scope == "blocks":
        yield Clash(f"{no_blocks} to compile", "compile.scope", "set compile=model")
    for key in ("freeze_depth", "layer_decay"):
        if getattr(config.finetune, key) is not None:
            remedy = "name the parameters instead (finetune.freeze, optim.groups)"
            yield Clash(f"{no_blocks}, and finetune.{key} counts in them", f"finetune.{key}", remedy)
