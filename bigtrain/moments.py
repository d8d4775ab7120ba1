"""Adam and AdamW that keep their moments in bfloat16: 4 bytes of state for a parameter, where torch's keep 8.

Weights, gradients and arithmetic stay as they are. A step widens a part of the moments at a time to the
weights' dtype, lets torch's fused kernel update them and the weights, and rounds them back to nearest, so that what is
wide at once is small. torch's kernel itself wants moments of the weights' dtype (2.11). Where torch.compile may be used
it makes one kernel of all that, which reads and writes everything once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# Elements whose moments are wide at once, in all parameters that are updated by one kernel: few next to a model's, and
# so many that a GPU has more to do with them than the host has to ask for it. A host's memory of more than a megabyte
# goes back to the system and is fetched anew in every step: measured, the step then takes four times as long.
_CHUNK = 1 << 24
_CHUNK_ON_HOST = 1 << 18
# Compiled, nothing is wide: only so few that 32 bits count them.
_CHUNK_COMPILED = 1 << 30


class _Part(NamedTuple):
    """A piece of one parameter to be updated; every tensor is a view of what is kept.

    Attributes:
        numel: How many elements it has.
        weight: Its weights.
        gradient: Of the same shape.
        moments: Those that the optimizer keeps, in the order of `MOMENTS`.
        step: The parameter's counter, already advanced.
    """

    numel: int
    weight: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor


class Bf16Moments(torch.optim.Optimizer):
    """The step of Adam and AdamW over moments in bfloat16.

    As torch's fused optimizers it divides gradients by `grad_scale` where that is set, and where `found_inf` is 1
    leaves weights, moments and counters as they were. It never waits for a device.
    """

    moments_dtype = torch.bfloat16
    _kernel: Callable[..., None]
    _is_decoupled: bool
    _compiled: Callable[..., None] | None = None

    def compile_step(self) -> None:
        """Let torch.compile make one kernel of a parameter's update; its numbers differ in the last bits."""
        self._compiled = torch.compile(_adam, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            UserError: Where one has gradients that are sparse, or is complex.
        """
        scale: Tensor | None = getattr(self, "grad_scale", None)
        skipped: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            counters = [self._state_of(p, group)["step"] for p in moved]
            if not moved:
                continue
            torch._foreach_add_(counters, 1)
            if self._compiled:
                self._update_compiled(moved, group, scale, skipped)
            else:
                for batch in _batches(part for p in moved for part in _parts(p, self.state[p])):
                    self._update(batch, group, scale, skipped)
            if skipped is not None:
                torch._foreach_sub_(counters, [skipped.to(counter.device) for counter in counters])

    def _state_of(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept for a parameter; zeros before its first step."""
        if not parameter.is_floating_point() or parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise UserError(
                "moments in bfloat16 need dense gradients of real numbers",
                where="optim.moments",
                remedy="set optim.moments=fp32, or build embeddings without sparse=True",
            )
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in MOMENTS[: 3 if group["amsgrad"] else 2]:
            if kind not in state:
                state[kind] = torch.zeros_like(parameter, dtype=self.moments_dtype, requires_grad=False)
        return state

    def _update(
        self, parts: Sequence[_Part], group: Mapping[str, Any], scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        device = parts[0].weight.device
        kept = [part.moments[i] for i in range(len(parts[0].moments)) for part in parts]
        wide = [torch.empty_like(part.weight) for _ in parts[0].moments for part in parts]
        torch._foreach_copy_(wide, kept)
        first, second, largest = (wide[i * len(parts) : (i + 1) * len(parts)] for i in range(3))
        self._kernel(
            [part.weight for part in parts],
            [part.gradient for part in parts],
            first,
            second,
            largest,
            [part.step for part in parts],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=None if scale is None else scale.to(device, non_blocking=True),
            found_inf=None if skipped is None else skipped.to(device, non_blocking=True),
        )
        torch._foreach_copy_(kept, wide)

    def _update_compiled(
        self, moved: Sequence[Tensor], group: Mapping[str, Any], scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        decay = group["weight_decay"] * (group["lr"] if self._is_decoupled else 1.0)
        numbers = (*(1 - beta for beta in group["betas"]), group["eps"], decay)
        shared: dict[torch.device, list[Tensor | None]] = {}  # numbers of Python would be compiled in
        for parameter, rate, root in zip(moved, *self._corrections(moved, group), strict=True):
            device = parameter.device
            if device not in shared:
                shared[device] = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
                shared[device] += [None if t is None else t.to(device, non_blocking=True) for t in (scale, skipped)]
            held = _held(parameter, self.state[parameter])
            if held[0].numel() < 2 or not _lie_in_one_row(held):  # each would be a kernel of its own to compile
                for part in _parts(parameter, self.state[parameter]):
                    self._update([part], group, scale, skipped)
                continue
            for tensors in _in_pieces(held, _CHUNK_COMPILED):
                # Detached, or there would be a graph for every number of dimensions of what they are views of.
                weight, gradient, *moments = (t.detach() for t in tensors)
                given = (weight, gradient, moments, rate, root, *shared[device])
                self._compiled(*given, is_decoupled=self._is_decoupled, maximize=group["maximize"])  # type: ignore[misc]

    def _corrections(self, moved: Sequence[Tensor], group: Mapping[str, Any]) -> list[list[Tensor]]:
        """For each parameter lr / (1 - beta1^t) and √(1 - beta2^t), of shape ()."""
        counters = [self.state[parameter]["step"] for parameter in moved]
        logs = (math.log(beta) if beta else -math.inf for beta in group["betas"])
        first, second = (torch._foreach_expm1(torch._foreach_mul(counters, log)) for log in logs)  # beta^t - 1
        torch._foreach_reciprocal_(first)
        torch._foreach_mul_(first, -group["lr"])
        torch._foreach_neg_(second)
        torch._foreach_sqrt_(second)
        return [list(first), list(second)]


class Bf16Adam(Bf16Moments, torch.optim.Adam):
    """torch's Adam with moments in bfloat16."""

    _kernel = staticmethod(torch._fused_adam_)
    _is_decoupled = False


class Bf16AdamW(Bf16Moments, torch.optim.AdamW):
    """torch's AdamW with moments in bfloat16."""

    _kernel = staticmethod(torch._fused_adamw_)
    _is_decoupled = True


def _adam(
    weight: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    rate: Tensor,
    root: Tensor,
    one_minus_beta1: Tensor,
    one_minus_beta2: Tensor,
    eps: Tensor,
    decay: Tensor,
    scale: Tensor | None,
    skipped: Tensor | None,
    *,
    is_decoupled: bool,
    maximize: bool,
) -> None:
    """One parameter's step (Kingma & Ba, 2014, algorithm 1; decoupled: Loshchilov & Hutter, 2017, algorithm 2).

    Args:
        weight: Written, as the moments are.
        gradient: Of the same shape.
        moments: In the order of `MOMENTS`; two or three.
        rate: The learning rate over the first moment's bias correction.
        root: The square root of the second's.
        one_minus_beta1: Of shape (), as all that follow.
        one_minus_beta2: For the second moment.
        eps: Added to the denominator.
        decay: Of the weights; decoupled: times the learning rate.
        scale: Gradients are divided by it.
        skipped: Where it is 1, nothing is written.
        is_decoupled: Whether weights decay by themselves and not in the gradient.
        maximize: Whether to go up.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    slope, value = gradient.to(exact), weight.to(exact)
    if scale is not None:
        slope = slope / scale
    if maximize:
        slope = -slope
    if is_decoupled:
        value = value - value * decay
    else:
        slope = slope + value * decay
    first, second, *largest = (moment.to(exact) for moment in moments)
    first = first + (slope - first) * one_minus_beta1
    second = second + (slope * slope - second) * one_minus_beta2
    largest = [torch.maximum(one, second) for one in largest]
    value = value - rate * first / ((largest or [second])[0].sqrt() / root + eps)
    for kept, new in zip((weight, *moments), (value, first, second, *largest), strict=True):
        kept.copy_(new if skipped is None else torch.where(skipped > 0, kept, new))


def _held(parameter: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """This rank's memory of a parameter, its gradient and its moments."""
    tensors = (parameter.detach(), parameter.grad, *(state[kind] for kind in MOMENTS if kind in state))
    return [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _lie_in_one_row(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _in_pieces(tensors: Sequence[Tensor], chunk: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor.view(-1), chunk) for tensor in tensors), strict=True)


def _parts(parameter: Tensor, state: Mapping[str, Any]) -> Iterator[_Part]:
    """A parameter as it is; in flat pieces where it is large and lies in one row; nothing where it has no elements."""
    held = _held(parameter, state)
    numel, chunk = held[0].numel(), _chunk(parameter)
    if not numel:
        return
    if numel <= chunk or not _lie_in_one_row(held):
        yield _Part(numel, held[0], held[1], tuple(held[2:]), state["step"])
        return
    for weight, gradient, *moments in _in_pieces(held, chunk):
        yield _Part(weight.numel(), weight, gradient, tuple(moments), state["step"])


def _chunk(weight: Tensor) -> int:
    return _CHUNK_ON_HOST if weight.device.type == "cpu" else _CHUNK


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """Parts for one kernel: of one device and dtype, and no more elements than a chunk, or one alone."""
    batch: list[_Part] = []
    size, kind = 0, None
    for part in parts:
        own_kind = (part.weight.device, part.weight.dtype)
        if batch and (own_kind != kind or size + part.numel > _chunk(part.weight)):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size, kind = size + part.numel, own_kind
    if batch:
        yield batch
