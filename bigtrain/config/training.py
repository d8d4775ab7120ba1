"""The sections that say what is trained: the run, its data, its length, its optimizer, its frozen parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bigtrain.config.fields import (
    Factor,
    ListOf,
    Name,
    Named,
    Patterns,
    Section,
    Seed,
    Share,
    refuse,
)


def _is_not_empty(value: str) -> str:
    if not value.strip():
        raise refuse("is empty", "give a path")
    return value


class Run(Section):
    """What the run is called, where its folder stands, and what its random numbers start from."""

    name: str = "run"
    """The run's name and its folder's; by default the run file's name without its ending."""

    dir: Annotated[str, AfterValidator(_is_not_empty)] = "runs"
    """The folder in which the run's own folder is made."""

    seed: Seed = 0
    """The seed of the initial weights, of the order of the samples and of every other random choice."""

    deterministic: bool = False
    """Use only deterministic algorithms, also where they are slower."""

    threads: Literal["auto"] | PositiveInt = "auto"
    """CPU threads of each process; auto shares the machine's cores among its processes."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        fits = 0 < len(value.encode()) <= 200 and value.isprintable() and value[0] not in ".-"
        if not fits or value != value.strip() or {"/", "\\"} & set(value):
            raise refuse(
                "cannot name a folder",
                "use up to 200 letters, digits, dots, underscores and dashes, without spaces at its ends;\n"
                "begin with a letter or a digit",
            )
        return value


class HeldOut(Section):
    """A share of the training data that is kept for evaluation."""

    split: Share
    """The share of the samples that is held out, between 0 and 1."""


class Transforms(Section):
    """What is done to each sample, in this order."""

    train: ListOf[Named] = ()
    """Transforms of training samples: names in torchvision.transforms.v2, with their args."""

    eval: ListOf[Named] = ()
    """Transforms of evaluation samples: names in torchvision.transforms.v2, with their args."""


class Mix(Section):
    """How training samples are mixed with one another, for classification."""

    mixup: NonNegativeFloat = 0.0
    """Mixup: the share of a sample is drawn from Beta(mixup, mixup), 0.2 say; 0: none."""

    cutmix: NonNegativeFloat = 0.0
    """CutMix: the share of the image that stays is drawn from Beta(cutmix, cutmix), 1.0 say; 0: none."""

    share: Factor = 1.0
    """The share of the samples that are mixed at all; with both kinds, each is taken for half of them."""

    @model_validator(mode="after")
    def _mixes(self) -> Mix:
        if not (self.mixup or self.cutmix):
            raise refuse("mixes nothing", "give mixup, cutmix or both, as in {mixup: 0.2, cutmix: 1.0}")
        return self


def _none_for_null(value: Any) -> Any:
    return "none" if value is None else value


def _kind_of_eval(value: Any) -> str:
    if value == "none":
        return "no evaluation"
    is_split = isinstance(value, Mapping) and not value.keys() & {"name", "args"}
    return "held out" if is_split or isinstance(value, HeldOut) else "data of its own"


EvalData = Annotated[
    Annotated[Literal["none"], Tag("no evaluation")]
    | Annotated[HeldOut, Tag("held out")]
    | Annotated[Named, Tag("data of its own")],
    Discriminator(_kind_of_eval),
    BeforeValidator(_none_for_null),
]


class Data(Section):
    """Where the samples come from and how they are cut into batches."""

    name: Name
    """digits, torchvision/<Dataset>, image_folder, text, tokens, conversations, synthetic, …, or pkg.mod:factory."""

    args: dict[str, Any] = Field(default_factory=dict)
    """The keyword arguments that the data are built with."""

    eval: EvalData = Field(default_factory=lambda: HeldOut(split=0.1))
    """What is evaluated on: a share held out, {split: 0.1}; data of its own, {name, args}; or none."""

    split_seed: Seed = 0
    """The seed that chooses the held-out samples; run.seed does not move them."""

    transforms: Transforms = Field(default_factory=Transforms)
    """What is done to each sample before it is batched."""

    mix: Mix | None = None
    """Mix training samples with one another, as {mixup: 0.2, cutmix: 1.0}; null: do not."""

    batch_size: PositiveInt = 64
    """Samples in an optimizer step, over all processes together."""

    workers: NonNegativeInt = 0
    """Processes that fetch samples for each rank; 0 fetches them in the rank itself."""


class Train(Section):
    """How long to train: exactly one of epochs and steps."""

    epochs: PositiveInt | None = None
    """How often to go through the training samples; or give train.steps."""

    steps: PositiveInt | None = None
    """How many optimizer steps to take; or give train.epochs."""

    micro_batch_size: PositiveInt | None = None
    """The most samples a process runs at once; accumulation follows from it. null: its share of the batch."""

    @field_validator("steps")
    @classmethod
    def _not_both(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("epochs") is not None:
            raise refuse("cannot stand beside train.epochs", "keep one of train.epochs and train.steps")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> Train:
        if self.epochs is None and self.steps is None:
            raise refuse("does not say how long to train", "give train.epochs or train.steps")
        return self


class Unfreeze(Section):
    """Parameters that begin to train, or go on at another rate, at an epoch or step."""

    at_epoch: PositiveInt | None = None
    """The epoch, counted from 0, at whose start these parameters begin to train; or give at_step."""

    at_step: PositiveInt | None = None
    """After how many optimizer steps these parameters begin to train; or give at_epoch."""

    match: Annotated[Patterns, Field(min_length=1)]
    """Patterns of parameter names, as in a shell: layer4.*, or a list of them."""

    lr_scale: PositiveFloat = 1.0
    """A factor on the learning rate of these parameters, from then on."""

    @model_validator(mode="after")
    def _says_when(self) -> Unfreeze:
        if (self.at_epoch is None) == (self.at_step is None):
            raise refuse("does not say when", "give exactly one of at_epoch and at_step")
        return self


class Adapter(Section):
    """Two small matrices beside each of some frozen ones: LoRA (Hu et al., arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    """The kind of adapter; there is one."""

    targets: Annotated[Patterns, Field(min_length=1)]
    """Patterns of the layers that get one, linear or convolutions: *.q_proj, or a list of them."""

    rank: PositiveInt = 8
    """How many columns the first of the two matrices has, and rows the second."""

    alpha: PositiveFloat = 16.0
    """What both together add is scaled by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of an adapted layer's inputs that the adapter does not see while it trains."""

    train: Patterns = ()
    """Patterns of the model's own parameters that train as well, as those of a new head have to."""


class Finetune(Section):
    """What the weights start from, and which of them train."""

    init_from: str | None = None
    """A checkpoint, a run, a .safetensors or .pt file, a Hugging Face folder, torchvision/<weights> to start from."""

    min_coverage: Factor | None = None
    """The share of the model's bytes that init_from must cover; null: all but what is declared new."""

    remap: dict[str, str] = Field(default_factory=dict)
    """Names in init_from's file that are others here: {theirs.*: ours.*}."""

    resize: Patterns = ()
    """Patterns of parameters of which init_from's file has more or less: the part that both have is taken."""

    new: Patterns = ()
    """Patterns of parameters that begin with initial values whatever init_from has."""

    ignore: Patterns = ()
    """Patterns of tensors of init_from's file to leave out, as further blocks of a deeper model."""

    freeze: Patterns = ()
    """Patterns of the parameters that do not train; one that matches nothing is an error."""

    freeze_depth: PositiveInt | None = None
    """How many of the model's repeated blocks do not train, the first of them and all that comes before them."""

    freeze_batchnorm: bool = False
    """Keep every BatchNorm frozen, its statistics too, even where what is around it begins to train."""

    unfreeze: ListOf[Unfreeze] = ()
    """When frozen parameters begin to train: a list of {at_epoch or at_step, match, lr_scale}, in order of time."""

    adapter: Adapter | None = None
    """Small matrices that train instead of the model, which is frozen: {targets, rank, alpha, dropout, train}."""

    feature_cache: Annotated[str, AfterValidator(_is_not_empty)] | None = None
    """A folder for what the frozen part makes of every sample: computed once, the head trains on it; null: none."""

    layer_decay: Share | None = None
    """A factor on the learning rate for each block further from the output; null: one rate for all."""

    @field_validator("remap")
    @classmethod
    def _has_one_star(cls, value: dict[str, str]) -> dict[str, str]:
        for theirs, ours in value.items():
            if theirs.count("*") > 1 or ours.count("*") > theirs.count("*"):
                raise refuse("has a pair that means nothing", "give pairs with one star each, or none: {a.*: b.*}")
        return value

    @field_validator("unfreeze")
    @classmethod
    def _is_in_order(cls, value: tuple[Unfreeze, ...]) -> tuple[Unfreeze, ...]:
        for unit in ("at_epoch", "at_step"):
            moments = [getattr(entry, unit) for entry in value]
            if None not in moments and moments == sorted(moments):
                return value
        raise refuse("is not in order of time", "give all entries at_epoch, or all at_step, the earliest first")
