"""Which parameters train when: the run file's plan, in terms of one model's parameters.

A plan has phases. Phase 0 is the beginning; each moment at which an entry of `finetune.unfreeze` begins starts another.
Which phase it is follows from the number of steps and epochs alone, so a run that goes on knows it without being told.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.config import schema
from bigtrain.errors import CombinationError, PatternError
from bigtrain.models.blocks import find_blocks
from bigtrain.patterns import match_names

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Thaw:
    """What begins to train at one moment, or goes on at another rate.

    Attributes:
        phase: The phase that begins at that moment.
        names: The parameters.
        lr_scale: The factor on their rates from then on.
    """

    phase: int
    names: frozenset[str]
    lr_scale: float


@dataclass(frozen=True)
class FreezePlan:
    """When which parameters of a model train, and at which share of their rates.

    Attributes:
        frozen: The parameters that do not train at first.
        thaws: What begins to train later, in order of time.
        layer_scales: The factor of each parameter's depth on its rate; empty where there is none.
        keeps_batchnorm: Whether every BatchNorm is frozen, whatever else trains.
        is_active: Whether the plan says anything of what trains.
    """

    frozen: frozenset[str]
    thaws: tuple[Thaw, ...]
    layer_scales: Mapping[str, float]
    keeps_batchnorm: bool
    is_active: bool

    @property
    def num_phases(self) -> int:
        """How many there are, those that a short run does not reach included."""
        return 1 + max((thaw.phase for thaw in self.thaws), default=0)

    def frozen_in(self, phase: int) -> frozenset[str]:
        """The parameters that do not train in a phase."""
        begun = [thaw.names for thaw in self.thaws if thaw.phase <= phase]
        return self.frozen.difference(*begun)

    def begins(self) -> dict[str, int]:
        """The phase in which each parameter begins to train, for those that do not do so from the start."""
        first: dict[str, int] = {}
        for thaw in self.thaws:
            for name in thaw.names & self.frozen:
                first.setdefault(name, thaw.phase)
        return first

    def lr_scales(self, phase: int) -> dict[str, float]:
        """The factor on each parameter's rate in a phase, where it is not 1."""
        scales = dict(self.layer_scales)
        latest: dict[str, float] = {}
        for thaw in self.thaws:
            if thaw.phase <= phase:
                latest |= dict.fromkeys(thaw.names, thaw.lr_scale)
        for name, scale in latest.items():
            scales[name] = scales.get(name, 1.0) * scale
        return scales

    def apply(self, model: nn.Module, phase: int) -> None:
        """Let train what trains in a phase, and nothing else.

        A BatchNorm whose parameters are all frozen is frozen whole: its running statistics stay, and it normalises
        with them in training too. One without parameters goes with the module around it.
        """
        frozen = self.frozen_in(phase)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if not self.is_active:
            return
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                _set_frozen(module, self.keeps_batchnorm or _is_still(model, name))


def plan_freezing(model: nn.Module, config: schema.Finetune) -> FreezePlan:
    """Work out what a run file says of which parameters train, for a plain model.

    Parameters that the model's factory has frozen itself stay so until an entry of `unfreeze` names them.

    Raises:
        PatternError: Where a pattern matches no parameter, or an entry of `unfreeze` would change nothing.
        CombinationError: Where depth is asked for and the model has no repeated blocks, or too few.
    """
    names = [name for name, _ in model.named_parameters()]
    depths = _depths(model, config)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    frozen.update(match_names(config.freeze, names, where="finetune.freeze"))
    if config.freeze_depth is not None:
        frozen.update(name for name in names if depths[name] <= config.freeze_depth)
    kept = _of_batchnorms(model) if config.freeze_batchnorm else set()
    frozen |= kept
    thaws = []
    for position, (entry, phase) in enumerate(zip(config.unfreeze, _phases(config), strict=True)):
        begun = match_names(entry.match, names, where=f"finetune.unfreeze.{position}.match")
        thaws.append(Thaw(phase, frozenset(begun) - kept, entry.lr_scale))
    scales = {}
    if config.layer_decay is not None:
        deepest = max(depths.values())
        scales = {name: config.layer_decay ** (deepest - depth) for name, depth in depths.items() if depth < deepest}
    is_active = bool(
        config.freeze or config.freeze_depth or config.freeze_batchnorm or config.unfreeze or config.adapter
    )
    plan = FreezePlan(frozenset(frozen), tuple(thaws), scales, config.freeze_batchnorm, is_active)
    _refuse_what_changes_nothing(plan, config)
    return plan


def _refuse_what_changes_nothing(plan: FreezePlan, config: schema.Finetune) -> None:
    """Refuse an entry of `unfreeze` that is without effect: whoever wrote it meant other parameters."""
    frozen, scales = plan.frozen, dict[str, float]()
    for position, (thaw, entry) in enumerate(zip(plan.thaws, config.unfreeze, strict=True)):
        if not thaw.names & frozen and all(scales.get(name, 1.0) == thaw.lr_scale for name in thaw.names):
            why = "stays frozen (finetune.freeze_batchnorm)" if not thaw.names else "trains before, at that rate"
            raise PatternError(
                f"what {', '.join(map(repr, entry.match))} matches {why}: nothing would change",
                where=f"finetune.unfreeze.{position}.match",
                remedy="name what is frozen until then, or give another lr_scale, or take the entry out",
            )
        frozen -= thaw.names
        scales |= dict.fromkeys(thaw.names, thaw.lr_scale)


def phase_at(config: schema.Finetune, steps: int, epoch: int) -> int:
    """The phase in which the next step is taken.

    Args:
        config: The run file's section.
        steps: How many steps have been taken.
        epoch: The epoch of the next step, from 0.
    """
    begun = [
        phase
        for entry, phase in zip(config.unfreeze, _phases(config), strict=True)
        if (epoch >= entry.at_epoch if entry.at_epoch is not None else steps >= (entry.at_step or 0))
    ]
    return max(begun, default=0)


def begins_at(config: schema.Finetune, steps_per_epoch: int) -> list[int]:
    """After how many steps each entry of `unfreeze` begins, where the batch size stays what it is."""
    return [
        entry.at_epoch * steps_per_epoch if entry.at_epoch is not None else entry.at_step or 0
        for entry in config.unfreeze
    ]


def frozen_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm modules that a plan has frozen, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _is_set_frozen(m)}


def _phases(config: schema.Finetune) -> list[int]:
    """The phase that each entry of `unfreeze` begins: entries of one moment begin one phase."""
    moments = [(entry.at_epoch, entry.at_step) for entry in config.unfreeze]
    number = {moment: phase for phase, moment in enumerate(dict.fromkeys(moments), 1)}
    return [number[moment] for moment in moments]


def _depths(model: nn.Module, config: schema.Finetune) -> dict[str, int]:
    """How deep each parameter lies: 0 before the first block, n in the n-th or right after it; the rest deepest.

    A model lists its parts in the order in which they run; what stands between two blocks goes with the first.
    """
    if config.freeze_depth is None and config.layer_decay is None:
        return {}
    blocks = [name for name, _ in find_blocks(model)]
    if not blocks or (config.freeze_depth or 0) > len(blocks):
        key = "layer_decay" if config.freeze_depth is None else "freeze_depth"
        raise CombinationError(
            f"{type(model).__name__} has {len(blocks)} repeated blocks, and finetune.{key} "
            + (f"is {config.freeze_depth}" if blocks and config.freeze_depth else "counts in them"),
            where=f"finetune.{key}",
            remedy="name the parameters instead (finetune.freeze, optim.groups), or let the model answer blocks()",
        )
    depths, depth, last = {}, 0, 0
    names = [name for name, _ in model.named_parameters()]
    for position, name in enumerate(names):
        inside = next((number for number, block in enumerate(blocks, 1) if name.startswith(f"{block}.")), None)
        depth = depth if inside is None else inside
        last = position if inside == len(blocks) else last
        depths[name] = depth
    return depths | dict.fromkeys(names[last + 1 :], len(blocks) + 1)


def _of_batchnorms(model: nn.Module) -> set[str]:
    """Names of the parameters of all BatchNorm modules."""
    norms = {p for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if p in norms}


def _is_still(model: nn.Module, name: str) -> bool:
    """Whether nothing trains in a module or, where it has no parameters, in the nearest one around it that has."""
    path = name.split(".") if name else []
    for end in range(len(path), -1, -1):
        own = list(model.get_submodule(".".join(path[:end])).parameters())
        if own:
            return not any(p.requires_grad for p in own)
    return False


def _set_frozen(module: _BatchNorm, frozen: bool) -> None:
    if frozen and not _is_set_frozen(module):
        module.eval()
        module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]
    elif not frozen and _is_set_frozen(module):
        del module.train
        module.train()


def _is_set_frozen(module: nn.Module) -> bool:
    return getattr(vars(module).get("train"), "__func__", None) is _stay


def _stay(module: Module, mode: bool = True) -> Module:
    """Instead of `train`: a frozen BatchNorm keeps its mode, however often the model around it changes its own."""
    return module
