"""torchvision's models by their builder's name, as torchvision makes them: no wrapper, no renamed parameter.

Two things are added, because a run file holds words and not functions: normalisation layers by name, and
images whose channels are not three.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn

from bigtrain.errors import ModelError
from bigtrain.named import call, load, suggest

_GROUPS = 32  # Wu & He, Group Normalization, 2018, table 3


def names() -> list[str]:
    """The builders that torchvision has."""
    return list(torchvision.models.list_models())


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or as many as divide both 32 and the channels."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


# Arguments that a builder gives to a function of torchvision's and not to the class.
_MOBILENET_V3 = ("width_mult", "reduced_tail", "dilated")
_PASSED_ELSEWHERE = {"mobilenet_v3_small": _MOBILENET_V3, "mobilenet_v3_large": _MOBILENET_V3}

_NORM_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "group_norm": group_norm,
    "batch_norm": nn.BatchNorm2d,
    "sync_batch_norm": nn.SyncBatchNorm,
    "frozen_batch_norm": torchvision.ops.FrozenBatchNorm2d,
}


def build(builder: str, args: dict[str, Any]) -> nn.Module:
    """Build a torchvision model with random weights.

    Args:
        builder: The builder's name, as in `torchvision.models.list_models()`.
        args: The builder's arguments. `norm_layer` may be group_norm, batch_norm, sync_batch_norm,
            frozen_batch_norm or package.module:name. Any model that begins with a convolution over three
            channels takes `in_channels`.

    Raises:
        ModelError: Where there is no such builder, or it does not take these arguments.
    """
    if builder not in names():
        near = suggest(builder, names(), "builders")
        raise ModelError(f"torchvision has no model {builder!r}", where="model.name", remedy=near)
    _refuse_weights(args)
    make = torchvision.models.get_model_builder(builder)
    args = {**_no_weights(make), **args}
    channels = args.pop("in_channels", 3)
    if isinstance(args.get("norm_layer"), str):
        args["norm_layer"] = _norm_layer(args["norm_layer"])
    name = f"torchvision/{builder}"
    model: nn.Module = call(make, args, name=name, error=ModelError, where="model.args", accepted=_accepted(make))
    if channels != 3:
        _replace_stem(model, channels, name)
    return model


def _refuse_weights(args: dict[str, Any]) -> None:
    asked = [arg for arg in args if arg.startswith("weights") or arg == "pretrained"]
    if asked:
        raise ModelError(
            f"{asked[0]}: a model is built without weights, and what it begins with is said elsewhere",
            where=f"model.args.{asked[0]}",
            remedy="leave it out, and name them as finetune.init_from: torchvision/<Model>_Weights.<name>, or a file",
        )


def _no_weights(make: Callable[..., nn.Module]) -> dict[str, None]:
    """Some builders download weights of the backbone unless they are told not to."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: None for p in parameters if p.name.startswith("weights") and p.default is not None}


def _accepted(make: Callable[..., nn.Module]) -> list[str]:
    """The arguments a builder passes on: those of the model's class, and of its bases as far as it passes on.

    This must be known here, because some of those classes swallow what they do not know.
    """
    accepted = ["in_channels", *_PASSED_ELSEWHERE.get(make.__name__, ())]
    for cls in inspect.signature(make).return_annotation.__mro__:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        accepted += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if cls is nn.Module or not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return accepted


def _norm_layer(name: str) -> Callable[..., nn.Module]:
    if ":" in name:
        layer: Callable[..., nn.Module] = load(name, error=ModelError, where="model.args.norm_layer")
        return layer
    if name not in _NORM_LAYERS:
        remedy = suggest(name, _NORM_LAYERS, "layers") + "\nany other is package.module:name"
        raise ModelError(f"there is no layer {name!r}", where="model.args.norm_layer", remedy=remedy)
    return _NORM_LAYERS[name]


def _replace_stem(model: nn.Module, channels: int, name: str) -> None:
    """Make the first convolution take `channels` channels, which get the kernels of the three in turn."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    fits = isinstance(channels, int) and channels > 0
    if not fits or stem is None or stem.in_channels != 3 or stem.groups != 1:
        raise ModelError(f"{name} cannot take images of {channels!r} channels", where="model.args.in_channels")
    kernels = stem.weight.detach()[:, [channel % 3 for channel in range(channels)]]
    stem.weight = nn.Parameter(kernels.contiguous())
    stem.in_channels = channels
