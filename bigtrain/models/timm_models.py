"""timm's models by name, as timm makes them: no wrapper, no renamed parameter. timm is an extra, imported only here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from bigtrain.errors import ModelError, SetupError
from bigtrain.named import call, nearest, suggest

# What timm itself does with arguments, before a model's class sees the others.
_COMMON = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "features_only", "out_indices")
_WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir")


def names() -> list[str]:
    """The models that timm has.

    Raises:
        SetupError: Where timm is not installed.
    """
    return list(_timm().list_models())


def build(model: str, args: dict[str, Any]) -> nn.Module:
    """Build a model of timm's with random weights.

    Args:
        model: Its name, as in `timm.list_models()`.
        args: The arguments of `timm.create_model`, which hands most of them on to the model's class.

    Raises:
        ModelError: Where there is no such model, it does not take these arguments, or weights are asked for.
        SetupError: Where timm is not installed.
    """
    _check_name(model)
    _refuse_weights(args)
    name = f"timm/{model}"
    make = partial(_timm().create_model, model)
    try:
        made: nn.Module = call(make, args, name=name, error=ModelError, where="model.args")
    except ModelError as failure:
        # Only the class that is built in the end knows what it takes, and none swallows what it does not know.
        unknown = next((arg for arg in args if _is_unknown(arg, failure.__cause__)), None)
        if unknown is None:
            raise
        remedy = suggest(unknown, _accepted(model), "arguments")
        raise ModelError(f"{name} has no argument {unknown!r}", where="model.args", remedy=remedy) from failure
    return made


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as missing:
        if missing.name != "timm":
            raise
        raise SetupError(
            "timm is not installed", where="model.name", remedy='install the extra: pip install "bigtrain[timm]"'
        ) from None
    return timm


def _check_name(model: str) -> None:
    known = names()
    if model in known:
        return
    plain, _, tag = model.partition(".")
    if tag and plain in known:
        raise ModelError(
            f"timm/{model}: {tag!r} names pretrained weights, and what a model begins with is said elsewhere",
            where="model.name",
            remedy=f"use timm/{plain}, and give the file of these weights as finetune.init_from",
        )
    near = nearest(model, known)  # of some 1,400 models not all can be named
    remedy = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() in Python lists them"
    raise ModelError(f"timm has no model {model!r}", where="model.name", remedy=remedy)


def _refuse_weights(args: dict[str, Any]) -> None:
    asked = next((arg for arg in args if arg.startswith(_WEIGHTS) and args[arg]), None)
    if asked:
        raise ModelError(
            f"{asked}: a model is built without weights, and what it begins with is said elsewhere",
            where=f"model.args.{asked}",
            remedy="leave it out, and give the file of the weights as finetune.init_from",
        )


def _is_unknown(arg: str, cause: BaseException | None) -> bool:
    text = str(cause)
    return isinstance(cause, TypeError) and "unexpected keyword argument" in text and repr(arg) in text


def _accepted(model: str) -> list[str]:
    """What timm takes for any model, and what the class of this one does, as far as its builder names the class."""
    cls = inspect.signature(_timm().model_entrypoint(model)).return_annotation
    return list(dict.fromkeys([*_COMMON, *_parameters(cls)]))


def _parameters(cls: Any) -> Iterator[str]:
    """The arguments of a class, and of its bases as far as it passes on."""
    for base in getattr(cls, "__mro__", ()):
        parameters = inspect.signature(base).parameters.values()
        yield from (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        if base is nn.Module or not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return
