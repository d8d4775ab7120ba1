"""The section that says how weights are updated: the optimizer, its groups, its rate, averages of the weights."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from bigtrain.catalogue import OPTIMIZERS
from bigtrain.config.fields import Factor, ListOf, Name, Patterns, Section, Share, refuse

_BETAS_OF_TORCH = (0.9, 0.999)
# The largest share of itself that a moment in bfloat16 may keep in a step. Measured against float32, on random
# gradients: the root of the second is 2 % off at 0.99, 5 % at 0.995, and several times too large at 0.998.
_LARGEST_BETA = 0.99


class OptimGroup(Section):
    """Parameters with hyperparameters of their own."""

    match: Annotated[Patterns, Field(min_length=1)]
    """Patterns of parameter names, as in a shell: head.*, or a list of them."""

    lr: NonNegativeFloat | None = None
    """These parameters' own learning rate; null: optim.lr."""

    weight_decay: NonNegativeFloat | None = None
    """These parameters' own weight decay; null: optim.weight_decay."""

    @model_validator(mode="after")
    def _changes_something(self) -> OptimGroup:
        if self.lr is None and self.weight_decay is None:
            raise refuse("changes nothing", "give the group lr, weight_decay or both, or take it out")
        return self


class Schedule(Section):
    """How the learning rate moves: a factor on every group's own rate. Each shape has keys of its own."""

    shorthand = "name"
    uses: ClassVar[dict[str, frozenset[str]]] = {
        "constant": frozenset(),
        "step": frozenset({"unit", "step_size", "gamma"}),
        "linear": frozenset({"unit", "min_factor"}),
        "cosine": frozenset({"unit", "min_factor"}),
        "wsd": frozenset({"unit", "decay", "min_factor"}),
    }

    name: Literal["constant", "step", "linear", "cosine", "wsd"] = "constant"
    """The shape after the warm-up; wsd stays at 1 and decays linearly at the end of the run."""

    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly to its full value."""

    unit: Literal["step", "epoch"] = "step"
    """Whether the factor changes at every step or only between epochs; step_size counts in it, too."""

    step_size: PositiveInt = 1
    """After how many units the step schedule multiplies the rate by gamma; it has to be given."""

    gamma: PositiveFloat = 0.1
    """What the step schedule multiplies the rate by."""

    decay: Factor = 0.1
    """The share of the run that wsd spends decaying, at its end."""

    min_factor: Factor = 0.0
    """The factor at which linear, cosine and wsd end."""

    @field_validator("unit", "step_size", "gamma", "decay", "min_factor")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        name, key = info.data.get("name"), info.field_name
        if name and key not in cls.uses[name]:
            users = ", ".join(user for user, keys in cls.uses.items() if key in keys)
            raise refuse(f"means nothing to the schedule {name}", f"take the key out; it belongs to {users}")
        return value

    @model_validator(mode="after")
    def _says_when(self) -> Schedule:
        if self.name == "step" and "step_size" not in self.model_fields_set:
            raise refuse("does not say when to step", "give optim.schedule.step_size, in units of its unit")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        used = self.uses[self.name] | {"name", "warmup_steps"}
        return {key: value for key, value in handler(self).items() if key in used}


class Ema(Section):
    """Moving averages of the weights, beside them."""

    decay: Share
    """The share of itself that an average keeps in a step, 0.999 say; less at first, (1 + step) / (10 + step)."""

    evaluate: bool = True
    """Evaluate with the averages instead of the weights."""


class Optim(Section):
    """The optimizer, its groups of parameters and its learning rate."""

    shorthand = "name"
    shorthand_is_one_key = True

    name: Name = "adamw"
    """sgd, adam, adamw, or pkg.mod:Class for your own."""

    lr: NonNegativeFloat = 1e-3
    """The learning rate, before the schedule's factor."""

    weight_decay: NonNegativeFloat = 0.01
    """The weight decay of all parameters but norms, biases and those of fewer than two dimensions."""

    decay_norms_and_biases: bool = False
    """Decay norms, biases and parameters of fewer than two dimensions as well."""

    clip_grad_norm: PositiveFloat | None = 1.0
    """The norm, over all gradients, down to which larger ones are scaled; null: they are left alone."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer's class: betas, eps, momentum, nesterov and so on."""

    moments: Literal["fp32", "bf16"] = "fp32"
    """What adam and adamw keep their moments in; bf16 takes 4 bytes a parameter instead of 8, and betas up to 0.99."""

    groups: ListOf[OptimGroup] = ()
    """Groups with a rate or weight decay of their own; the last one that matches a parameter wins."""

    schedule: Schedule = Field(default_factory=Schedule)
    """How the learning rate moves over the run."""

    ema: Ema | None = None
    """Moving averages of the trained weights, as {decay: 0.999}; null: none."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if ":" not in value and value not in OPTIMIZERS:
            listed = ", ".join(OPTIMIZERS)
            raise refuse("is not an optimizer", f"take {listed}, or pkg.mod:Class for your own", OPTIMIZERS)
        return value

    @field_validator("moments")
    @classmethod
    def _can_be_kept(cls, value: str, info: ValidationInfo) -> str:
        name, args = info.data.get("name"), info.data.get("args")
        if value == "fp32" or name is None or args is None:  # what is wrong with those is said already
            return value
        if name not in ("adam", "adamw"):
            raise refuse(f"is for adam and adamw, and the optimizer is {name}", "set optim.name=adamw, or take it out")
        chosen = sorted({"foreach", "fused", "capturable", "differentiable"} & set(args))
        if chosen:
            raise refuse(f"leaves no choice of {chosen[0]}", f"take optim.args.{chosen[0]} out")
        betas = args.get("betas", _BETAS_OF_TORCH)
        betas = betas if isinstance(betas, list | tuple) else ()  # what they are not is found with the other arguments
        if any(isinstance(beta, float) and beta > _LARGEST_BETA for beta in betas):
            raise refuse(
                f"cannot follow betas of {list(betas)}: its steps are 1/256 to 1/128 of a value; "
                f"{_LARGEST_BETA} is the largest that works",
                "set optim.args.betas=[0.9, 0.95]",
            )
        return value
