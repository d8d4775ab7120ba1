"""bf16 in the one sense that it has under every engine: parameters of float32, and copies of them to compute with.

Parameters and the model's floating inputs are cast on their way into forward and backward, its floating outputs back
to float32, in which the loss is computed. Buffers are left alone, and there is no autocast, which would decide
operation by operation. Gradients reach the parameters through the cast, so they add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Elements. For fewer, what Python costs in backward is more than a faster kernel saves.
_LARGE = 1 << 20


class Casting:
    """Lets a module compute in a lower precision than its parameters are kept in.

    Args:
        model: The plain module.
        dtype: What it computes in.
        parameters: Those to be cast here; an engine may cast others itself, as it gathers them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, parameters: Sequence[Tensor]) -> None:
        self._dtype = dtype
        self._parameters = [p for p in parameters if p.is_floating_point()]
        wanted = set(self._parameters)
        self._places = [
            (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p in wanted
        ]
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        self._handles = [
            model.register_forward_pre_hook(self._cast_inputs, with_kwargs=True),
            model.register_forward_hook(self._cast_outputs),
        ]
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for norm in self._norms:
            norm.forward = partial(_batch_norm, norm.forward, norm)  # type: ignore[method-assign]

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Put the copies in the parameters' places, for everything that runs a forward or a backward.

        They stay until the end of backward, because activation checkpointing runs parts of forward in it.
        """
        copies = {p: _copy(p, self._dtype) for p in self._parameters}
        self._put(copies.__getitem__)
        try:
            yield
        finally:
            self._put(lambda parameter: parameter)

    def _put(self, value: Callable[[Tensor], Tensor]) -> None:
        for module, name, parameter in self._places:
            module._parameters[name] = value(parameter)  # type: ignore[assignment]
        if self._places:
            for module in self._recurrent:  # torch keeps a list of their weights beside them
                module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        for norm in self._norms:
            del norm.forward

    def _cast_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return cast(args, self._dtype), cast(kwargs, self._dtype)

    def _cast_outputs(self, module: nn.Module, args: Any, output: Any) -> Any:
        return cast(output, torch.float32)


def _copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    is_large = parameter.numel() >= _LARGE
    copy: Tensor = _Copy.apply(parameter, dtype) if is_large else parameter.to(dtype)
    return copy


class _Copy(torch.autograd.Function):
    """`parameter.to(dtype)`, whose gradient comes back by a kernel that takes a GPU two thirds of the time (2.11)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = parameter.dtype
        return parameter.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() or gradient.layout != torch.strided:
            return gradient.to(ctx.dtype), None
        wide = torch.empty_like(gradient, dtype=ctx.dtype)
        torch._foreach_copy_([wide], [gradient])
        return wide, None


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same value with its floating tensors in `dtype`, through tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        parts = {key: cast(item, dtype) for key, item in value.items()}
        if type(value) is dict:
            return parts
        value.update(parts)  # transformers' ModelOutput and its like have constructors of their own
        return value
    if isinstance(value, (tuple, list)):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _batch_norm(forward: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm with its own weights in float32: beside float32 statistics torch takes no others."""
    held = dict(norm._parameters)
    norm._parameters.update({name: None if p is None else p.float() for name, p in held.items()})  # type: ignore[misc]
    try:
        return forward(x)
    finally:
        norm._parameters.update(held)
