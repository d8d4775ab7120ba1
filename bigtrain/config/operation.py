"""The sections that say how a training is carried out: engine, checkpoints, evaluation, tracking, launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bigtrain.config.fields import ListOf, Name, Named, Patterns, Section, refuse
from bigtrain.metrics import is_better_when_large, is_better_when_small


class Fsdp(Section):
    """What only the fsdp engine reads."""

    shard_size: PositiveInt | None = None
    """How many ranks share one copy of the model, which the others repeat; null: all ranks share one."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after the forward pass: less memory, more communication."""

    cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in host memory."""


class DeepSpeed(Section):
    """What only the deepspeed engine reads."""

    stage: Literal[0, 1, 2, 3] = 3
    """What is cut up over the ranks: 1 the optimizer's state, 2 gradients as well, 3 weights as well; 0 nothing."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's state and the master weights are kept and updated instead of device memory."""

    offload_params: Literal["none", "cpu"] = "none"
    """Where the weights are kept instead of device memory, in stage 3."""

    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's own configuration; one that bigtrain sets itself is an error."""


class Engine(Section):
    """What spreads the training over processes, and on which devices."""

    shorthand = "name"
    shorthand_is_one_key = True

    name: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """What spreads the training over processes; auto picks one and says why; ZeRO's stage is engine.deepspeed.stage."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs where there are any."""

    fsdp: Fsdp = Field(default_factory=Fsdp)
    """What only the fsdp engine reads."""

    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    """What only the deepspeed engine reads."""


class Compile(Section):
    """What torch.compile compiles."""

    shorthand = "scope"

    scope: Literal["none", "blocks", "model"] = "none"
    """none; blocks: each of the model's repeated parts, soon done; model: the whole, which takes longer."""

    fullgraph: bool = True
    """Refuse a model that cannot be traced as one graph; false: run the rest of it as it is."""


class EveryBlocks(Section):
    """Activation checkpointing of some of the blocks."""

    every: PositiveInt
    """Compute the activations of one block in this many again."""


def _without_prefix(value: str) -> str:
    return value.removeprefix("eval/")


class Goal(Section):
    """A number of the evaluations by which they are compared."""

    shorthand = "metric"

    metric: Annotated[Name, AfterValidator(_without_prefix)]
    """The number's name, as evaluations show it: loss, accuracy, f1, perplexity, mse and so on."""

    mode: Literal["auto", "min", "max"] = "auto"
    """Whether the smaller or the larger one is better; auto goes by the name."""

    @model_validator(mode="after")
    def _has_a_direction(self) -> Self:
        if self.mode == "auto" and not (is_better_when_small(self.metric) or is_better_when_large(self.metric)):
            raise refuse("does not tell which is better", f"say so, as in {{metric: {self.metric}, mode: max}}")
        return self

    @property
    def is_better_when_small(self) -> bool:
        """Whether the smaller one of two is better."""
        return is_better_when_small(self.metric) if self.mode == "auto" else self.mode == "min"


class KeepBest(Goal):
    """By what the best checkpoint is known."""


class EarlyStop(Goal):
    """When a run ends before its last step."""

    patience: PositiveInt = 5
    """How many evaluations in a row may be no better before the run ends."""

    min_delta: NonNegativeFloat = 0.0
    """By how much an evaluation must be better than the best one to count as better."""


class Checkpoint(Section):
    """When the training state is saved, how long it is kept, and what a new start does with it."""

    every_steps: PositiveInt | None = 100
    """Save after this many optimizer steps; null: not by steps."""

    every_minutes: PositiveFloat | None = None
    """Save after this many minutes; null: not by the clock."""

    at_end: bool = True
    """Save when the training ends."""

    keep: PositiveInt | None = 3
    """How many of the newest checkpoints to keep, at least two; null: all."""

    keep_every: PositiveInt | None = None
    """Keep for good every checkpoint whose step is a multiple of this; null: none."""

    keep_best: KeepBest | None = None
    """Save after an evaluation better than all before, by this metric, and keep that one too; null: do not."""

    background: bool = True
    """Write checkpoints while the training goes on."""

    resume: Literal["auto", "never"] = "auto"
    """Whether a start in a folder that holds a run goes on from its last good checkpoint."""

    weights: Literal["auto", "all", "trainable"] = "auto"
    """Which are saved; trainable leaves frozen ones in the file they came from; auto: so with an adapter, else all."""

    on_full: Literal["stop", "continue"] = "stop"
    """What to do where the disk is full: stop the run, or train on and save later."""


class Eval(Section):
    """When the model is evaluated, and on how much."""

    every_epochs: PositiveInt | None = 1
    """Evaluate after this many epochs, and at the end; null: at the end only."""

    every_steps: PositiveInt | None = None
    """Evaluate after this many optimizer steps instead of epochs, and at the end."""

    max_batches: PositiveInt | None = None
    """The most batches, of data.batch_size samples, that one evaluation runs; null: all of them."""

    early_stop: EarlyStop | None = None
    """End the run when evaluations get no better, as {metric: loss, patience: 5}; null: at its last step."""

    @model_validator(mode="before")
    @classmethod
    def _steps_instead_of_epochs(cls, value: Any) -> Any:
        by_steps = isinstance(value, Mapping) and value.get("every_steps") is not None
        return {"every_epochs": None, **value} if by_steps else value

    @field_validator("every_steps")
    @classmethod
    def _not_both(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("every_epochs") is not None:
            raise refuse("cannot stand beside eval.every_epochs", "keep one of the two")
        return value


class Wandb(Section):
    """Whether and how numbers go to Weights & Biases."""

    shorthand = "mode"

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """online, offline (files in the run folder, to be sent later), disabled; auto: online where a login exists."""

    project: str | None = None
    """The project there; null: the variable WANDB_PROJECT, or bigtrain."""

    entity: str | None = None
    """The user or team there; null: the login's own."""

    group: str | None = None
    """The group of runs that it is shown in."""

    tags: Patterns = ()
    """Tags, beside those for the engine, the number of processes and the precision."""

    upload_checkpoints: bool = False
    """Upload checkpoints; false: tell W&B where they lie."""


class TensorBoard(Section):
    """What TensorBoard is given beside the numbers."""

    histograms_every: PositiveInt | None = None
    """Optimizer steps between two histograms of every weight; null: none."""

    graph: bool = False
    """Write the graph of the model once."""


class Track(Section):
    """Where the numbers go."""

    log_every: PositiveInt = 10
    """Optimizer steps between two lines of the log and of metrics.jsonl."""

    communication_every: PositiveInt | None = None
    """Measure how long one step in so many only communicates, under torch's profiler, on rank 0; null: never."""

    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """What the terminal shows; auto draws a live view on a terminal and writes plain lines elsewhere."""

    wandb: Wandb = Field(default_factory=Wandb)
    """Weights & Biases: auto, online, offline, disabled, or {mode, project, entity, …}."""

    tensorboard: bool | TensorBoard = False
    """Whether numbers go to TensorBoard's files, or {histograms_every, graph}."""

    trackers: ListOf[Named] = ()
    """Trackers of your own, pkg.mod:Class or {name, args}: log(row) takes a row, close() ends it."""

    report: bool = True
    """Write report.html when the run ends."""


class Health(Section):
    """What is watched, and what happens when it goes wrong."""

    hang_timeout_s: PositiveFloat | None = 600.0
    """Seconds without any progress after which a rank counts as hanging and the run is started again; null: never."""

    startup_timeout_s: PositiveFloat | None = 1800.0
    """Seconds that everything up to the end of the first step may take, compiling included; null: for ever."""

    compare_every: PositiveInt | None = 100
    """Compare what ranks hold copies of after this many steps, and before every checkpoint; null: never."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or a gradient norm is not finite: stop, or leave that step out."""

    spike_factor: Annotated[float, Field(gt=1)] | None = 5.0
    """A loss so many times the mean of the last 50 steps', and twice their largest, is a spike; null: none is."""

    on_spike: Literal["tell", "roll_back"] = "tell"
    """What to do about a spike: tell, or go on from the checkpoint before it without the batches since."""


class Profile(Section):
    """Which steps to profile."""

    steps: Annotated[ListOf[NonNegativeInt], Field(min_length=2, max_length=2)]
    """The first step that is profiled, counted from 0, and the one after the last."""

    @field_validator("steps")
    @classmethod
    def _rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[0] >= value[1]:
            raise refuse("holds no step", "give the first step and the one after the last, as [10, 15]")
        return value


class Launch(Section):
    """How `bigtrain launch` starts the processes."""

    target: Literal["local", "slurm"] = "local"
    """Where the processes are started."""

    nproc: Literal["auto"] | PositiveInt = "auto"
    """Processes on each node; auto takes one for each GPU, or one where there is none."""

    nodes: PositiveInt = 1
    """How many nodes to start on."""

    profile: str | None = None
    """The cluster's profile: a name in slurm/, or a file."""

    slurm: dict[str, Any] = Field(default_factory=dict)
    """Keys of the cluster's profile to change."""

    max_restarts: NonNegativeInt = 3
    """How often in a row the run is started again after a failure without having saved a new checkpoint."""
