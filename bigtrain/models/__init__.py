"""Models by name: our own, those of other libraries, and what a user brings.

Our models are plain modules that import torch only, and know no engine, config or trainer. Other libraries
are imported when one of their models is asked for.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from bigtrain.catalogue import HUGGING_FACE, MODELS, TIMM, TORCHVISION, weights_folder
from bigtrain.errors import ModelError
from bigtrain.named import call, load, suggest


def names() -> list[str]:
    """The models that need no extra: ours, then torchvision's. This imports torchvision."""
    from bigtrain.models import torchvision_models

    return [*MODELS, *(TORCHVISION + builder for builder in torchvision_models.names())]


def build(name: str, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model.

    Args:
        name: One of ours, `torchvision/<builder>`, `timm/<model>`, `hf/<folder>`, or `package.module:factory`;
            `factory(**args)` returns a module.
        args: Its arguments.

    Raises:
        ModelError: Where there is no such model, an argument does not fit, or no usable module comes out.
        SetupError: Where the model's library is an extra that is not installed.
    """
    args = dict(args or {})
    if name.startswith(TORCHVISION):
        from bigtrain.models import torchvision_models

        model: object = torchvision_models.build(name.removeprefix(TORCHVISION), args)
    elif name.startswith(TIMM):
        from bigtrain.models import timm_models

        model = timm_models.build(name.removeprefix(TIMM), args)
    elif name.startswith(HUGGING_FACE):
        from bigtrain.models import hugging_face

        make = partial(hugging_face.build, name.removeprefix(HUGGING_FACE))
        model = call(make, args, name=name, error=ModelError, where="model.args")
    else:
        factory = load(_find(name), error=ModelError, where="model.name")
        model = call(factory, args, name=name, error=ModelError, where="model.args")
    return _checked(model, name)


def look_at(name: str) -> None:
    """Refuse a folder that is none before anything else is looked for in it; of other names nothing is said yet.

    Raises:
        ModelError: Where there is no such folder, or it describes nothing that can be trained.
    """
    if name.startswith(HUGGING_FACE):
        from bigtrain.models import hugging_face

        hugging_face.look_at(name.removeprefix(HUGGING_FACE))


def is_fillable(name: str, args: Mapping[str, Any] | None = None) -> bool:
    """Whether the model answers `init_tensor`, and so can be built without memory and filled piece by piece.

    A class is looked at, and a factory's annotated return type. torchvision's and timm's models do not answer, those
    of Hugging Face do where their weights are read from a file.

    Raises:
        ModelError: Where there is no such model.
    """
    if name.startswith((TORCHVISION, TIMM)):
        return False
    if name.startswith(HUGGING_FACE):
        return weights_folder(name, args or {}) is not None
    factory = load(_find(name), error=ModelError, where="model.name")
    made = factory if isinstance(factory, type) else typing.get_type_hints(factory).get("return")
    return hasattr(made, "init_tensor")


def _find(name: str) -> str:
    """Where the factory of a model lies, as `package.module:attribute`."""
    if ":" in name:
        return name
    if name not in MODELS:
        remedy = suggest(name, names(), "models") + "\na model of your own is package.module:factory"
        raise ModelError(f"there is no model {name!r}", where="model.name", remedy=remedy)
    return MODELS[name]


def _checked(model: object, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned {type(model).__name__}, not a torch.nn.Module",
            where="model.name",
            remedy="name a function or class that makes the module",
        )
    lazy = [parameter for parameter, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"{name} has parameters without a shape: {', '.join(lazy[:3])}",
            where="model.name",
            remedy="give layers their sizes: nn.Linear, not nn.LazyLinear",
        )
    return model
