"""The composition root: the one place that knows every part, and builds a training out of a run file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from bigtrain import data as data_layer
from bigtrain import engines, models, tasks
from bigtrain.catalogue import hugging_face_folder
from bigtrain.compiling import compile_parts, try_compiled
from bigtrain.config import combinations
from bigtrain.config.schema import Adapter, Config
from bigtrain.data import EvalLoader, TrainLoader
from bigtrain.data.labels import labels_of
from bigtrain.dist import World
from bigtrain.doors.base import Base
from bigtrain.engines import Choices, Engine
from bigtrain.engines.averaging import Averaged
from bigtrain.engines.base import Zero
from bigtrain.errors import DataError, ModelError
from bigtrain.finetune.adapters import build_model, with_adapter
from bigtrain.finetune.freeze import FreezePlan, begins_at, frozen_batchnorms, phase_at, plan_freezing
from bigtrain.fitting import try_first_batch
from bigtrain.goals import Goals
from bigtrain.health.pulse import Pulse
from bigtrain.health.spikes import watch_spikes
from bigtrain.loop import Loop, evaluate
from bigtrain.models.blocks import sees_whole_batch
from bigtrain.moving import moved
from bigtrain.named import call
from bigtrain.optim import OptimizerPlan, Schedule, make_schedule, plan_optimizer
from bigtrain.prepare import COMPUTE_DTYPES, DTYPES, Prepared, prepare, refuse_local_batchnorm, seed_everything
from bigtrain.progress import Cadence, Hook, Outcome, Saver
from bigtrain.protocols import Batch, Dataset, Task
from bigtrain.tracking.base import Tracker


@dataclass(frozen=True)
class Subject:
    """What a user brings as objects; what is None is built by the names in the run file.

    Attributes:
        model: A module, or a function without arguments that makes one.
        data: A dataset, or one to train on and one to evaluate on.
        task: A task.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    data: Dataset | tuple[Dataset, Dataset | None] | None = None
    task: Task | None = None


@dataclass
class Training:
    """Every part of a training, built and not yet begun."""

    config: Config
    world: World
    task: Task
    model: nn.Module
    engine: Engine
    plan: OptimizerPlan
    schedule: Schedule
    train: TrainLoader
    evaluation: EvalLoader | None
    cadence: Cadence
    engine_label: str
    engine_reason: str
    sets: data_layer.DataSets
    sizes: list[tuple[int, bool]]  # for each parameter: its elements, and whether it is trained
    freezing: FreezePlan
    phase: int  # of the freeze plan: what this model and engine were built for
    class_names: list[str] | None = None  # of the labels, where the data tell
    average: Averaged | None = None  # the engine itself, where it keeps averages of the weights
    when_closed: list[Callable[[], None]] = field(default_factory=list)  # what leaves the model as it was
    base: Base | None = None  # frozen weights that checkpoints leave where they came from
    frozen: Mapping[str, Any] | None = None  # by what checkpoints know it; None where no phase is proved

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        return self.sets.fingerprint

    @property
    def engine_choice(self) -> str:
        """The engine, and why it is this one."""
        return f"engine {self.engine_label} ({self.engine_reason})"

    def loop(
        self,
        trackers: Sequence[Tracker] = (),
        hooks: Sequence[Hook] = (),
        saver: Saver | None = None,
        done: Outcome | None = None,
        pulse: Pulse | None = None,
    ) -> Loop:
        """The loop over all of it, from its first step, or from where it is done already."""
        evaluation = self.evaluation
        return Loop(
            engine=self.engine,
            task=self.task,
            world=self.world,
            steps=self.train.steps(data_layer.Position(*(done.position if done else (0, 0)))),
            eval_batches=None if evaluation is None else lambda: evaluation,
            schedule=self.schedule,
            base_lrs=[group.hyper["lr"] for group in self.plan.groups],
            cadence=self.cadence,
            trackers=trackers,
            hooks=hooks,
            on_nonfinite=self.config.health.on_nonfinite,
            move=self.move,
            saver=saver,
            done=done,
            pulse=pulse,
            after_step=None if self.average is None else self.average.update,
            compare_every=self.config.health.compare_every,
            forward_waits=engines.shards(self.engine.name, self.config.engine.deepspeed.stage),
            goals=goals_of(self.config, self.world),
            spikes=watch_spikes(self.config.health, done.recent if done else ()),
        )

    def go_on_from(self, done: Outcome) -> None:
        """Count the steps that are left from where the run is, which a change of the batch size moves."""
        self.cadence = _cadence(self.config, self.train, done)
        self.schedule = _schedule(self.config, self.cadence, self.train)

    def unreached(self) -> dict[str, int]:
        """The keys of `finetune.unfreeze` that do not begin before the run ends, with the steps they begin after."""
        moments = begins_at(self.config.finetune, self.train.steps_per_epoch)
        late = {f"finetune.unfreeze.{number}": moment for number, moment in enumerate(moments)}
        return {key: moment for key, moment in late.items() if moment >= self.cadence.total_steps}

    def move(self, batch: Batch) -> Batch:
        """A batch on this rank's device, in the run's dtype."""
        return moved(batch, self.world.device, DTYPES[self.config.precision])

    def close(self) -> None:
        """End the loaders' workers and let go of the engine."""
        self.train.close()
        if self.evaluation is not None:
            self.evaluation.close()
        for undo in self.when_closed:
            undo()
        self.engine.close()


def assemble(
    config: Config,
    world: World,
    subject: Subject = Subject(),
    *,
    adapt: Callable[[nn.Module], object] | None = None,
    phase: int = 0,
) -> Training:
    """Build every part, in the order in which they need one another. Every rank must call it.

    Args:
        config: The run file.
        world: This rank's place.
        subject: What the user brings as objects.
        adapt: Called with the plain model before anything is wrapped around it.
        phase: The phase of the freeze plan to build for.
    """
    name, why = engines.choose(config.engine.name, world.size)
    task = build_task(config, subject)
    sets = build_data(config, subject)
    show_labels(task, sets)
    is_cut_up = engines.shards(name, config.engine.deepspeed.stage)
    prepared, freezing = _prepare(config, subject, world, phase, shards=is_cut_up)
    train, evaluation = loaders(config, sets, world, prepared.model)
    if adapt is not None:
        adapt(prepared.model)
    try_first_batch(task, prepared.model, sets, world, config.run.seed, train.smallest_microbatch(config.train.steps))
    plan = plan_for_phase(prepared.model, config, freezing, phase)
    sizes = [(p.numel(), p.requires_grad) for p in prepared.model.parameters()]
    compiled = compile_parts(config, name, prepared.model, prepared.blocks)
    choices = _choices(config, prepared, compiled)
    engine = engines.build(name, prepared.model, prepared.blocks, plan, world, choices)
    average = _averaged(engine, config, prepared.model, plan)
    cadence = _cadence(config, train)
    schedule = _schedule(config, cadence, train)
    # From here on random numbers are each rank's own: dropout must differ between ranks.
    seed_everything(config.run.seed + world.rank)
    label = f"deepspeed stage {config.engine.deepspeed.stage}" if name == "deepspeed" else name
    parts = (task, prepared.model, average or engine, plan, schedule, train, evaluation, cadence)
    facts = (label, why, sets, sizes, freezing, phase, class_names_of(sets), average)
    training = Training(config, world, *parts, *facts)
    if config.compile.scope != "none":
        batch = next(iter(evaluation)) if evaluation else next(train.steps()).microbatches[0]
        try_compiled(engine, task, training.move(batch), compiled, is_stage_3=label == "deepspeed stage 3")
    _check_goals(training)
    return training


def goals_of(config: Config, world: World) -> Goals:
    """What the run file says of stopping early and of the best checkpoint."""
    return Goals(world, config.eval.early_stop, config.checkpoint.keep_best)


def _check_goals(training: Training) -> None:
    """See by an evaluation of one batch that what is to be compared is measured. Every rank must call it."""
    config, evaluation = training.config, training.evaluation
    if config.eval.early_stop or config.checkpoint.keep_best:
        batches = [training.move(batch) for batch in itertools.islice(evaluation, 1)] if evaluation else []
        numbers = evaluate(training.engine, training.task, batches, training.world) if batches else None
        goals_of(config, training.world).check(numbers)


def _averaged(engine: Engine, config: Config, model: nn.Module, plan: OptimizerPlan) -> Averaged | None:
    wanted = config.optim.ema
    names = {name for group in plan.groups for name in group.names} | {name for name, _ in model.named_buffers()}
    names -= {f"{norm}.{own}" for norm, module in frozen_batchnorms(model).items() for own, _ in module.named_buffers()}
    return None if wanted is None else Averaged(engine, names, wanted.decay, evaluates=wanted.evaluate)


def build_task(config: Config, subject: Subject = Subject()) -> Task:
    """The task, by name or as it was given."""
    if subject.task is None:
        task = tasks.build(config.task.name, config.task.args)
    else:
        task = tasks.checked(subject.task, config.task.name)
    if config.data.mix and not getattr(task, "takes_mixtures", False):
        combinations.refuse(combinations.of_mixtures(config.task.name))
    return task


def show_labels(task: Task, sets: data_layer.DataSets) -> None:
    """Show a task the labels of all samples to train on, where it wants to see them."""
    if getattr(task, "wants_labels", False):
        task.see_labels(labels_of(sets.train), class_names_of(sets))  # type: ignore[attr-defined]


def build_data(config: Config, subject: Subject = Subject()) -> data_layer.DataSets:
    """The samples to train and to evaluate on, by name or as they were given."""
    data = config.data
    options: dict[str, Any] = {
        "split_seed": data.split_seed,
        "train_transforms": data.transforms.train,
        "eval_transforms": data.transforms.eval,
    }
    share_or_named: Any = None if data.eval == "none" else getattr(data.eval, "split", data.eval)
    if subject.data is None:
        models.look_at(config.model.name)  # among whose files the tokenizer is
        folder = hugging_face_folder(config.model.name)
        return data_layer.build(data.name, data.args, evaluation=share_or_named, tokenizer=folder, **options)
    if isinstance(subject.data, tuple):
        if len(subject.data) != 2:
            raise DataError(
                f"data= is a tuple of {len(subject.data)}",
                remedy="give one dataset, or a pair: to train on, and to evaluate on",
            )
        return data_layer.combine(*subject.data, **options)
    return data_layer.combine(subject.data, share_or_named, **options)


def prepare_whole(config: Config, subject: Subject = Subject()) -> nn.Module:
    """The plain model with its initial values, frozen where it should be: whole, on the host."""
    return _prepare(config, subject, World(), 0, shards=False)[0].model


def plan_for_phase(model: nn.Module, config: Config, freezing: FreezePlan, phase: int) -> OptimizerPlan:
    """The optimizer of one phase of the freeze plan, for a plain model that is frozen accordingly."""
    scales, begins = freezing.lr_scales(phase), freezing.begins()
    compiles = config.compile.scope != "none"
    return plan_optimizer(model, config.optim, lr_scales=scales, begins=begins, compiles=compiles)


def _prepare(
    config: Config, subject: Subject, world: World, phase: int, *, shards: bool
) -> tuple[Prepared, FreezePlan]:
    given = subject.model
    if isinstance(given, nn.Module) and (config.finetune.unfreeze or config.finetune.adapter):
        why = "built anew for each phase of finetune.unfreeze" if config.finetune.unfreeze else "changed by an adapter"
        raise ModelError(
            f"model= is a {type(given).__name__}, and the model is {why}", remedy="give a function that makes it"
        )
    plans: list[FreezePlan] = []

    def freeze(model: nn.Module) -> None:
        plans.append(plan_freezing(model, config.finetune))
        for later in range(plans[0].num_phases - 1, phase, -1):  # what cannot be is refused now, not when it begins
            plans[0].apply(model, later)
            refuse_local_batchnorm(model, world.size)
        plans[0].apply(model, phase)

    make = partial(build_model, config) if given is None else partial(_given, given, config.finetune.adapter)
    prepared = prepare(
        make,
        fillable=given is None and models.is_fillable(config.model.name, config.model.args),
        freeze=freeze,
        seed=config.run.seed,
        device=world.device,
        dtype=DTYPES[config.precision],
        num_processes=world.size,
        shards=shards,
        recompute=_recompute(config),
    )
    return prepared, plans[0]


def _recompute(config: Config) -> str | int:
    wanted = config.activation_checkpointing
    return wanted if isinstance(wanted, str) else wanted.every


def _given(model: nn.Module | Callable[[], nn.Module], adapter: Adapter | None) -> nn.Module:
    made = model
    if callable(model) and not isinstance(model, nn.Module):
        made = call(model, {}, name="model=", error=ModelError, where="model")
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{'model=' if made is model else 'model()'} is {type(made).__name__}",
            remedy="give a torch.nn.Module, or a function that makes one",
        )
    if any(isinstance(p, DTensor) for p in made.parameters()):
        raise ModelError(
            f"the {type(made).__name__} that was given has been cut up already, as by an earlier run under fsdp",
            remedy="give a function that makes the model: each run then begins with a new one",
        )
    return with_adapter(made, adapter)


def _choices(config: Config, prepared: Prepared, compiled: Sequence[nn.Module]) -> Choices:
    fsdp, deepspeed = config.engine.fsdp, config.engine.deepspeed
    return Choices(
        clip_grad_norm=config.optim.clip_grad_norm,
        shard_size=fsdp.shard_size,
        reshard_after_forward=fsdp.reshard_after_forward,
        cpu_offload=fsdp.cpu_offload,
        fill=prepared.fill,
        compute_dtype=COMPUTE_DTYPES.get(config.precision),
        recomputes=_recompute(config) != "none",
        compiled_blocks=compiled,
        zero=Zero(
            stage=deepspeed.stage,
            offload_optimizer=deepspeed.offload_optimizer == "cpu",
            offload_params=deepspeed.offload_params == "cpu",
            extra=deepspeed.extra,
        ),
    )


def class_names_of(sets: data_layer.DataSets) -> list[str] | None:
    """The names of the labels, where the data tell."""
    return [str(name) for name in getattr(sets.train, "class_names", None) or ()] or None


def loaders(
    config: Config, sets: data_layer.DataSets, world: World, model: nn.Module | None = None
) -> tuple[TrainLoader, EvalLoader | None]:
    """One rank's batches, to train on and to evaluate on; of one shape for torch.compile, if the model allows."""
    data = config.data
    shared: dict[str, Any] = {
        "batch_size": data.batch_size,
        "rank": world.rank,
        "world_size": world.size,
        "workers": data.workers,
        "static_shapes": config.compile.scope != "none" and not (model is not None and sees_whole_batch(model)),
    }
    mix, seed = data.mix, config.run.seed
    own: dict[str, Any] = {
        "micro_batch_size": config.train.micro_batch_size,
        "seed": seed,
        "mixing": data_layer.Mixing(mix.mixup, mix.cutmix, mix.share, seed) if mix else None,
    }
    train = TrainLoader(sets.train, **own, **shared)
    if sets.eval is None:
        return train, None
    most = config.eval.max_batches and config.eval.max_batches * data.batch_size
    if config.train.micro_batch_size is not None:  # the most that a rank can hold
        shared["batch_size"] = min(data.batch_size, config.train.micro_batch_size * world.size)
    return train, EvalLoader(sets.eval, max_samples=most, **shared)


def _schedule(config: Config, cadence: Cadence, train: TrainLoader) -> Schedule:
    return make_schedule(config.optim.schedule, total_steps=cadence.total_steps, steps_per_epoch=train.steps_per_epoch)


def _cadence(config: Config, train: TrainLoader, done: Outcome | None = None) -> Cadence:
    epoch, offset = done.position if done else (0, 0)
    epochs = (config.train.epochs or 0) - epoch
    # Not counted from what was consumed of the epoch, which a batch size that has changed need not divide.
    steps_left = -(-(train.num_samples - offset) // config.data.batch_size) + (epochs - 1) * train.steps_per_epoch
    return Cadence(
        total_steps=config.train.steps or (done.steps if done else 0) + (steps_left if epochs > 0 else 0),
        log_every=config.track.log_every,
        eval_every_steps=config.eval.every_steps,
        eval_every_epochs=config.eval.every_epochs,
        phase_at=partial(phase_at, config.finetune) if config.finetune.unfreeze else None,
    )
