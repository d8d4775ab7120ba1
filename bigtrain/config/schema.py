"""The whole run file as one typed value: each key, with its type, range, default and help, declared once.

The fields of `Config` stand in the order of the run file. `loader` reads files into it; this module reads
nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bigtrain.catalogue import weights_folder
from bigtrain.config.fields import Named, Section
from bigtrain.config.operation import (
    Checkpoint,
    Compile,
    DeepSpeed,
    EarlyStop,
    Engine,
    Eval,
    EveryBlocks,
    Fsdp,
    Health,
    KeepBest,
    Launch,
    Profile,
    TensorBoard,
    Track,
    Wandb,
)
from bigtrain.config.optimizing import Ema, Optim, OptimGroup, Schedule
from bigtrain.config.training import (
    Adapter,
    Data,
    EvalData,
    Finetune,
    HeldOut,
    Mix,
    Run,
    Train,
    Transforms,
    Unfreeze,
)

__all__ = [
    "Adapter",
    "Checkpoint",
    "Compile",
    "Config",
    "Data",
    "DeepSpeed",
    "EarlyStop",
    "Ema",
    "Engine",
    "Eval",
    "EvalData",
    "EveryBlocks",
    "Finetune",
    "Fsdp",
    "Health",
    "HeldOut",
    "KeepBest",
    "Launch",
    "Mix",
    "Named",
    "Optim",
    "OptimGroup",
    "Profile",
    "Run",
    "Schedule",
    "Section",
    "TensorBoard",
    "Track",
    "Train",
    "Transforms",
    "Unfreeze",
    "Wandb",
]


class Config(Section):
    """A whole run file."""

    run: Run = Field(default_factory=Run)
    """The run's name, folder and seed."""

    task: Named
    """What is learnt: classification, text_classification, causal_lm, regression, or pkg.mod:Class."""

    model: Named
    """bigmodel, gpt, lstm, torchvision/<builder>, timm/<model>, hf/<folder>, or pkg.mod:factory for your own."""

    data: Data
    """Where the samples come from and how they are cut into batches."""

    train: Train
    """How long to train: exactly one of epochs and steps."""

    optim: Optim = Field(default_factory=Optim)
    """The optimizer, its groups and its learning rate."""

    engine: Engine = Field(default_factory=Engine)
    """What spreads the training over processes."""

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """The numbers of forward and backward; bf16 keeps its master weights in fp32, and fp64 is for proofs."""

    compile: Compile = Field(default_factory=Compile)
    """What torch.compile compiles: none, blocks, model, or {scope, fullgraph}."""

    activation_checkpointing: Literal["none", "full", "ops"] | EveryBlocks = "none"
    """Which activations are computed again in the backward pass; {every: 2}: those of every second block."""

    finetune: Finetune = Field(default_factory=Finetune)
    """What the weights start from, and which of them train."""

    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When the training state is saved, and how long it is kept."""

    eval: Eval = Field(default_factory=Eval)
    """When the model is evaluated, and on how much."""

    track: Track = Field(default_factory=Track)
    """Where the numbers go."""

    health: Health = Field(default_factory=Health)
    """What is watched, and what happens when it goes wrong."""

    profile: Profile | None = None
    """Which steps to profile; null: none."""

    launch: Launch = Field(default_factory=Launch)
    """How `bigtrain launch` starts the processes."""

    @property
    def begins_with(self) -> str | None:
        """The weights that the run begins with: those it names, or those of the model's own folder; None for none."""
        return self.finetune.init_from or weights_folder(self.model.name, self.model.args)

    @property
    def leaves_frozen(self) -> bool:
        """Whether checkpoints leave frozen weights in the file that they came from."""
        by_itself = self.finetune.adapter is not None and self.begins_with is not None
        return self.checkpoint.weights == "trainable" or (self.checkpoint.weights == "auto" and by_itself)
