"""Adapters: two small matrices beside each of some frozen ones, through peft (LoRA; Hu et al., arXiv:2106.09685).

peft puts a layer around each that is adapted: what was `q_proj.weight` is `q_proj.base_layer.weight` in the model from
then on, beside `q_proj.lora_A.default.weight`. Which name is whose is said here alone. peft is an extra, imported only
here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import models
from bigtrain.config import schema
from bigtrain.errors import CombinationError, PatternError, SetupError
from bigtrain.patterns import match_names

_BASE = ".base_layer."
_FIRST, _SECOND = ".lora_A.default.weight", ".lora_B.default.weight"
_WHERE = "finetune.adapter"


def build_model(config: schema.Config) -> nn.Module:
    """The model of a run file, with its adapter where it names one."""
    return with_adapter(models.build(config.model.name, config.model.args), config.finetune.adapter)


def with_adapter(model: nn.Module, config: schema.Adapter | None) -> nn.Module:
    """Put an adapter beside the layers of a plain model that the run file names, and let nothing else train.

    Args:
        model: It is changed.
        config: The run file's section; None leaves the model as it is.

    Returns:
        The model itself.

    Raises:
        PatternError: Where a pattern matches no layer that can have one.
        CombinationError: Where a layer shares its weight with another.
        SetupError: Where peft is not installed.
    """
    if config is None:
        return model
    targets = _targets(model, config)
    own = [name for name, _ in model.named_parameters()]
    trained = set(match_names(config.train, own, where=f"{_WHERE}.train"))
    inputs = {name: _num_inputs(model.get_submodule(name)) for name in targets}
    peft = _peft()
    # The rest of the model has the initial values that it has without.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft finds out, and tells
        peft.inject_adapter_in_model(lora_config(config, targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or plain_name(name) in trained)
    if hasattr(model, "init_tensor"):
        model.init_tensor = _Filling(model.init_tensor, inputs)  # type: ignore[assignment, arg-type]
    return model


def lora_config(config: schema.Adapter, targets: list[str], **further: Any) -> Any:
    """Peft's own description of an adapter, for layers by their whole names."""
    pattern = "|".join(re.escape(name) for name in targets)  # a list would match the ends of names
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=f"({pattern})",
        bias="none",
        **further,
    )


def plain_name(name: str) -> str:
    """What a parameter is called in the model without an adapter."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return name.endswith((_FIRST, _SECOND))


def is_of_peft(names: Sequence[str]) -> bool:
    """Whether these are the names in a file that peft has written: an adapter alone."""
    return any(".lora_" in name for name in names) and all(name.startswith("base_model.model.") for name in names)


def pair_of(name: str) -> tuple[str, str]:
    """The names of the two matrices beside a frozen weight `….base_layer.weight`."""
    layer = name.removesuffix("base_layer.weight").removesuffix(".")
    return layer + _FIRST, layer + _SECOND


def is_adapted(name: str) -> bool:
    """Whether a weight may have an adapter beside it."""
    return name.endswith(_BASE + "weight")


def layer_of(name: str) -> str:
    """The layer, by its plain name, of an adapted weight or of one of the two matrices."""
    return re.sub(r"\.(base_layer|lora_[AB]\.default)\.weight$", "", name)


def transposed_layers(model: nn.Module) -> list[str]:
    """The adapted layers, by plain name, whose weights are (inputs, outputs): transformers' Conv1D."""
    return [name for name, layer in model.named_modules() if getattr(layer, "fan_in_fan_out", None) is True]


def merged(weight: Tensor, first: Tensor, second: Tensor, config: schema.Adapter, *, transposed: bool) -> Tensor:
    """The weight that computes what a frozen one and its adapter do together, in the weight's own dtype.

    Args:
        weight: The frozen one: (outputs, inputs) of a linear layer, (outputs, inputs, …) of a convolution.
        first: (rank, inputs), of a convolution (rank, inputs, …).
        second: (outputs, rank), of a convolution (outputs, rank, 1, …).
        config: The run file's section.
        transposed: Whether the weight is (inputs, outputs).
    """
    product = second.flatten(1).double() @ first.flatten(1).double()  # (outputs, inputs · kernel)
    if transposed:
        product = product.T
    added = product.reshape(weight.shape) * (config.alpha / config.rank)
    return (weight.double() + added).to(weight.dtype)


# ---- which layers ----------


def _targets(model: nn.Module, config: schema.Adapter) -> list[str]:
    """The layers of a plain model that get an adapter."""
    layers = {name: layer for name, layer in model.named_modules() if name}
    able = [name for name, layer in layers.items() if _can_have_one(layer)]
    try:
        names = match_names(config.targets, able, where=f"{_WHERE}.targets", what="layer that can have an adapter")
    except PatternError as error:
        error.remedy = (
            f"{error.remedy}\nlinear layers can have one, and convolutions without groups and dilation; "
            "classes derived of them cannot"
        )
        raise
    shared = _shared(model)
    for name in names:
        if layers[name].weight in shared:
            raise CombinationError(
                f"{name} shares its weight with another layer, which an adapter beside one of them would part",
                where=f"{_WHERE}.targets",
                remedy="leave it out of the targets",
            )
    return names


def _can_have_one(layer: nn.Module) -> bool:
    """Whether it is linear or a plain convolution; a class derived of these may compute something else."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # peft's adapter knows neither groups nor dilation, and fills up with zeros.
        is_plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        return is_plain and type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    is_transformers = type(layer).__module__ == "transformers.pytorch_utils" and type(layer).__name__ == "Conv1D"
    return type(layer) is nn.Linear or is_transformers


def _num_inputs(layer: nn.Module) -> int:
    """How many inputs one element of an adapter's first product sums over."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if type(layer).__name__ == "Conv1D":  # (inputs, outputs)
        return weight.shape[0]
    return math.prod(weight.shape[1:])


def _shared(model: nn.Module) -> set[Tensor]:
    seen: set[Tensor] = set()
    shared: set[Tensor] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if parameter in seen else seen).add(parameter)
    return shared


class _Filling:
    """Initial values of a model with an adapter: its own, and the adapter's as peft draws them.

    The first matrix is uniform within 1 / √inputs (Kaiming's rule with a = √5), the second is zero: the model computes
    at first what it does without.

    Args:
        own: The model's own `init_tensor`.
        inputs: How many inputs each adapted layer sums over.
    """

    def __init__(self, own: Callable[[str, Tensor], None], inputs: Mapping[str, int]) -> None:
        self._own, self._inputs = own, inputs

    def __call__(self, name: str, tensor: Tensor) -> None:
        if name.endswith(_SECOND):
            tensor.zero_()
        elif name.endswith(_FIRST):
            bound = 1 / math.sqrt(self._inputs[layer_of(name)])
            tensor.uniform_(-bound, bound)
        else:
            self._own(plain_name(name), tensor)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as missing:
        if missing.name not in ("peft", "transformers"):
            raise
        raise SetupError(
            f"{missing.name} is not installed",
            where=_WHERE,
            remedy='install the extra: pip install "bigtrain[transformers]"',
        ) from None
    return peft
