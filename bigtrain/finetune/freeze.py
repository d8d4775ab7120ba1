"""Freezing by name patterns."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.patterns import match_names

Module = TypeVar("Module", bound=nn.Module)


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that the patterns name.

    A BatchNorm whose parameters are all frozen is frozen whole: its running statistics stay, and it normalises with
    them in training too.

    Raises:
        PatternError: Where a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters())
    for name in match_names(patterns, list(parameters), where="finetune.freeze"):
        parameters[name].requires_grad_(False)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if patterns and isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()
            module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]


def _stay(module: Module, mode: bool = True) -> Module:
    """Instead of `train`: a frozen BatchNorm keeps its mode."""
    return module
