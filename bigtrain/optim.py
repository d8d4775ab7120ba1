"""Optimizers, their groups, and learning-rate schedules.

Groups are lists of parameter names, so that an engine can put in the tensors it really updates: whole parameters,
shards, flat slices. Schedules are pure functions of the number of steps taken: there is no scheduler to save.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.catalogue import OPTIMIZERS
from bigtrain.config import schema
from bigtrain.errors import PatternError, UserError
from bigtrain.models.blocks import norm_and_bias
from bigtrain.moments import Bf16Adam, Bf16AdamW, Bf16Moments
from bigtrain.named import check_arguments, load
from bigtrain.patterns import match_names

Schedule = Callable[[int], float]

_BUILT_IN: dict[str, type[torch.optim.Optimizer]] = {
    name: getattr(torch.optim, spec.partition(":")[2]) for name, spec in OPTIMIZERS.items()
}
_WITH_BF16_MOMENTS: dict[str, type[torch.optim.Optimizer]] = {"adam": Bf16Adam, "adamw": Bf16AdamW}


@dataclass(frozen=True)
class Group:
    """Parameters that share every hyperparameter.

    Attributes:
        names: The parameters' names.
        hyper: Their hyperparameters; `lr` is the rate before the schedule's factor.
    """

    names: tuple[str, ...]
    hyper: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerPlan:
    """An optimizer to be built over whatever tensors an engine updates.

    Attributes:
        cls: The optimizer's class.
        args: What its constructor is given besides the groups: some classes keep an argument to themselves, and all
            of torch's check values there alone.
        groups: The groups, by name.
        elementwise: Whether the update of an element depends on nothing but that element, so that shards may be
            updated alone.
        fusable: Whether it updates by torch's fused kernels, which also scale gradients and skip a step on the device.
        compiles: Whether torch.compile may make kernels for it.
    """

    cls: type[torch.optim.Optimizer]
    args: Mapping[str, Any]
    groups: tuple[Group, ...]
    elementwise: bool
    fusable: bool
    compiles: bool = False

    def build(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer over `tensors`, which holds every name of every group.

        Raises:
            UserError: Where the class refuses the value of an argument.
        """
        fused: dict[str, Any] = {"fused": True} if self.fusable else {}
        try:
            optimizer = self.cls(self.param_groups(tensors), **self.args, **fused)
        except (TypeError, ValueError, RuntimeError) as cause:
            given = ", ".join(f"{name}={value!r}" for name, value in self.args.items())
            raise UserError(f"{self.cls.__name__} refuses {given}: {cause}", where="optim") from cause
        if self.compiles and isinstance(optimizer, Bf16Moments):
            optimizer.compile_step()
        return optimizer

    def bytes_per_element(self) -> float:
        """What the optimizer keeps for each element of a float32 parameter, found by one step on a small one."""
        tried = torch.ones(8, 16, requires_grad=True)
        kept = self._after_one_step(tried).values()
        return sum(value.nbytes for value in kept if isinstance(value, Tensor) and value.ndim) / tried.numel()

    def slots(self, ndim: int) -> set[str]:
        """The names of the tensors that it keeps for a parameter of so many dimensions, found likewise."""
        kept = self._after_one_step(torch.ones((2,) * ndim, requires_grad=True))
        return {name for name, value in kept.items() if isinstance(value, Tensor)}

    def dtype_of_slot(self, weight: torch.dtype, stored: torch.dtype) -> torch.dtype:
        """What a tensor is kept in that has been stored in one dtype, for a parameter of another.

        Moments are of the dtype that the run file says, whatever a checkpoint has; a user's own optimizer finds what it
        kept.
        """
        if issubclass(self.cls, Bf16Moments):
            return self.cls.moments_dtype
        return weight if self.cls in _BUILT_IN.values() else stored

    def _after_one_step(self, tried: Tensor) -> Mapping[str, Any]:
        optimizer = self.cls([tried], **self.args)
        tried.grad = torch.zeros_like(tried)
        optimizer.step()
        return dict(optimizer.state[tried])

    def param_groups(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The groups as an optimizer takes them, each with its parameters' names and its own rate besides."""
        return [
            {"params": [tensors[n] for n in g.names], **g.hyper, "names": g.names, "base_lr": g.hyper["lr"]}
            for g in self.groups
        ]


def plan_optimizer(
    model: nn.Module,
    config: schema.Optim,
    *,
    lr_scales: Mapping[str, float] | None = None,
    begins: Mapping[str, int] | None = None,
    compiles: bool = False,
) -> OptimizerPlan:
    """Decide class, groups and hyperparameters for the trainable parameters of a plain, unsharded model.

    Of the entries of `optim.groups` that match a parameter, the last one to give a rate decides its rate, and the
    last one to give a decay its decay. Parameters of normalisation layers, biases and parameters of fewer than two
    dimensions are not decayed, unless `decay_norms_and_biases` is set or their group says so.

    Raises:
        PatternError: Where a pattern matches no parameter, or only frozen ones.
        UserError: Where there is no such optimizer, or it does not know an argument.
    """
    cls = _WITH_BF16_MOMENTS[config.name] if config.moments == "bf16" else _find_class(config.name)
    common = _common_arguments(cls, config)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        has_any = next(model.parameters(), None) is not None
        why = "every parameter is frozen" if has_any else f"{type(model).__name__} has no parameters"
        raise PatternError(f"nothing to train: {why}", where="finetune.freeze" if has_any else "model")
    undecayed = set() if config.decay_norms_and_biases else norm_and_bias(model)
    lr_scales, begins = lr_scales or {}, begins or {}
    ever = [name for name, _ in model.named_parameters() if name in named or name in begins]
    overrides = _overrides_by_name(config.groups, ever)
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name in named:
        hyper = dict(common)
        if name in undecayed and "weight_decay" in hyper:
            hyper["weight_decay"] = 0.0
        hyper |= overrides[name]
        hyper["lr"] *= lr_scales.get(name, 1.0)
        key = repr((sorted(hyper.items()), begins.get(name, 0)))
        groups.setdefault(key, (hyper, []))[1].append(name)
    built_in = config.name in _BUILT_IN
    implementation_is_chosen = bool({"fused", "foreach", "dampening"} & set(config.args))
    return OptimizerPlan(
        cls,
        common,
        tuple(Group(tuple(names), hyper) for hyper, names in groups.values()),
        elementwise=built_in or bool(getattr(cls, "elementwise", False)),
        fusable=built_in and not implementation_is_chosen,
        compiles=compiles,
    )


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    cls: Any = load(name, error=UserError, where="optim.name")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(
            f"{name!r} is not a torch.optim.Optimizer class",
            where="optim.name",
            remedy="name a class derived of torch.optim.Optimizer (docs/extending.md has an example)",
        )
    _, *given = inspect.signature(cls.step).parameters.values()  # the first is self
    needed = [p.name for p in given if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise UserError(
            f"{name} wants {', '.join(needed)} in every step, to run the model more than once",
            where="optim.name",
            remedy="take an optimizer whose step() needs nothing but the gradients",
        )
    return cls


def _common_arguments(cls: type[torch.optim.Optimizer], config: schema.Optim) -> dict[str, Any]:
    """What every group starts from: rate, weight decay where the class has one, and the further arguments."""
    where = "optim.args"
    for name in sorted({"params", "lr", "weight_decay"} & set(config.args)):
        remedy = "the learning rate and the weight decay are optim.lr and optim.weight_decay"
        raise UserError(f"{name} cannot stand in optim.args", where=where, remedy=remedy)
    check_arguments(cls, {"params": (), "lr": config.lr, **config.args}, name=config.name, error=UserError, where=where)
    parameters = inspect.signature(cls).parameters.values()
    if any(p.name == "weight_decay" or p.kind == p.VAR_KEYWORD for p in parameters):
        return {"lr": config.lr, **config.args, "weight_decay": config.weight_decay}
    if any(group.weight_decay is not None for group in config.groups):
        raise UserError(f"{config.name} has no weight decay, and a group sets it", where="optim.groups")
    return {"lr": config.lr, **config.args}


def _overrides_by_name(groups: Sequence[schema.OptimGroup], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    for position, group in enumerate(groups):
        where = f"optim.groups.{position}.match"
        for name in match_names(group.match, names, where=where, what="parameter that trains"):
            result[name] |= {
                key: value
                for key, value in (("lr", group.lr), ("weight_decay", group.weight_decay))
                if value is not None
            }
    return result


def make_schedule(config: schema.Schedule, *, total_steps: int, steps_per_epoch: int) -> Schedule:
    """The factor on every group's own rate, as a pure function of the number of steps already taken.

    During warm-up the factor of step k (from 0) is (k + 1) / warmup_steps. After it, with t the share of the
    remaining steps taken: constant 1; step gamma^(units // step_size); linear 1 - t; cosine (1 + cos(pi t)) / 2
    (Loshchilov and Hutter, arXiv:1608.03983, equation 5, without restarts); wsd 1 and then linear over the last
    `decay` share of the run (Hu et al., arXiv:2404.06395). The last three end at `min_factor`.
    """
    warmup = config.warmup_steps
    span = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        at = step if config.unit == "step" else step // steps_per_epoch * steps_per_epoch
        done = min(1.0, max(0, at - warmup) / span)
        if config.name == "step":
            units = step - warmup if config.unit == "step" else step // steps_per_epoch
            return float(config.gamma ** (units // config.step_size))
        return config.min_factor + (1 - config.min_factor) * _shape(config, done, total_steps, at)

    return factor


def _shape(config: schema.Schedule, done: float, total_steps: int, at: int) -> float:
    if config.name == "linear":
        return 1.0 - done
    if config.name == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2.0
    if config.name == "wsd":
        tail = max(1, round(config.decay * total_steps))
        return min(1.0, (total_steps - at) / tail)
    return 1.0
