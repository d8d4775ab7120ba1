"""The output layer of a language model, and its cross-entropy without the logits of all tokens at once.

Logits of a microbatch, tokens × vocabulary, are often the largest tensor of a training; kept in float32 beside their
gradient they take more memory than many a model. The loss must then be computed where the layer's weight is: under
FSDP2 and ZeRO-3 it is whole only while the module that owns it runs forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # torch's default for a target that does not count

# Elements, 0.5 GiB in float32. A chunk of fewer tokens would spend more time on adding up the weight's gradient than on
# multiplying, where the vocabulary is large; up to here logits are computed at once.
MOST_LOGITS = 1 << 27
# On a large GPU as many as take, with all that is made of them, some 2 % of its memory: 12 bytes of 512 for each.
_MEMORY_PER_LOGIT = 512
# Tensor cores multiply fastest where every side is a multiple of this.
_ALIGNMENT = 128
# Elements of a gradient in bfloat16 that are in float32 at once while it is scaled.
_WIDE = 1 << 24

LossAndSlopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Head(nn.Linear):
    """Logits of hidden states, or at once the sum of the cross-entropies of their targets.

    Args:
        width: Elements of a hidden state.
        vocab: Tokens.
    """

    _loss_and_slopes: LossAndSlopes | None = None

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__(width, vocab, bias=False)

    def compile_loss(self) -> None:
        """Let torch.compile make few kernels of what is done with a chunk's logits, for shapes that never change."""
        self._loss_and_slopes = torch.compile(_loss_and_slopes, dynamic=False)

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (…, vocab) of hidden states (…, width).

        Args:
            input: The hidden states.
            targets: (…) int64; -100 does not count.

        Returns:
            With targets the sum of their cross-entropies, of shape (), in float32 or better. Where logits are cut in
            chunks there is no second derivative of it.
        """
        if targets is None:
            return super().forward(input)
        hidden, targets = input.flatten(0, -2), targets.flatten()  # (N, width), (N,)
        most = _most_logits(hidden.device)
        if len(targets) * self.out_features <= most:
            return _cross_entropy(F.linear(hidden, self.weight), targets)[1]
        tokens = _tokens_at_once(len(targets), max(1, most // self.out_features))
        trains = torch.is_grad_enabled()
        wanted = (trains and hidden.requires_grad, trains and self.weight.requires_grad)
        total: Tensor = _ChunkedCrossEntropy.apply(hidden, self.weight, targets, tokens, wanted, self._loss_and_slopes)
        return total


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _most_logits(device: torch.device) -> int:
    """How many logits are computed at once."""
    if device.type != "cuda":
        return MOST_LOGITS
    return max(MOST_LOGITS, int(torch.cuda.get_device_properties(device).total_memory) // _MEMORY_PER_LOGIT)


def _tokens_at_once(number: int, most: int) -> int:
    """The tokens of a chunk: as few chunks as `most` allows, of one size as nearly as that can be aligned."""
    most -= most % _ALIGNMENT if most > _ALIGNMENT else 0
    evenly = math.ceil(number / math.ceil(number / most))
    return min(most, _ALIGNMENT * math.ceil(evenly / _ALIGNMENT))


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, vocab) and the sum of the targets' cross-entropies, in float32 or better."""
    scores = torch.log_softmax(logits, dim=-1, dtype=_at_least_fp32(logits.dtype))
    return scores, F.nll_loss(scores, targets, ignore_index=IGNORED, reduction="sum")


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies, some tokens at a time, with its gradients computed along the way.

    The loss is a sum, so gradients need only be scaled in backward. Computing them while a chunk's logits are at hand
    costs what the whole loss costs, three products; recomputing the logits in backward would be a fourth.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tokens: int,
        wanted: tuple[bool, bool],
        compiled: LossAndSlopes | None,
    ) -> Tensor:
        exact = _at_least_fp32(hidden.dtype)
        total = hidden.new_zeros((), dtype=exact)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for start in range(0, len(targets), tokens):
            rows = slice(start, start + tokens)
            logits = F.linear(hidden[rows], weight)
            if not any(wanted):
                total = total + _cross_entropy(logits, targets[rows])[1]
                continue
            loss, slopes = (compiled or _loss_and_slopes_in_place)(logits, targets[rows])
            del logits
            total = total + loss  # written into, it would have no gradients in graphs of torch 2.11
            ignored = (targets[rows] == IGNORED).unsqueeze(1)
            if to_hidden is not None:
                to_hidden[rows] = (slopes @ weight).masked_fill_(ignored, 0)
            if to_weight is not None:
                _add_product(to_weight, slopes.mT, hidden[rows].masked_fill(ignored, 0))
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else _scaled(saved, gradient) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """A product with a factor of shape (), which on a GPU torch would round to the other's dtype first."""
    if saved.dtype == factor.dtype or torch.compiler.is_compiling():
        return (saved.to(factor.dtype) * factor).to(saved.dtype)
    scaled, rows = torch.empty_like(saved), max(1, _WIDE // saved.shape[1])
    for new, old in zip(torch.split(scaled, rows), torch.split(saved, rows), strict=True):
        new.copy_(old.to(factor.dtype) * factor)
    return scaled


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a matrix product to a sum of equal or higher precision."""
    if a.is_cuda and a.dtype == b.dtype != total.dtype and not torch.compiler.is_compiling():
        # Added up inside the kernel: a product of its own would be written, rounded, and read again.
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _loss_and_slopes_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies, and its derivatives by the logits (N, vocab): softmax - one at the target.

    Rows whose target does not count have derivatives that mean nothing.
    """
    scores, loss = _cross_entropy(logits, targets)
    slopes = scores.exp_()
    index = targets.clamp(min=0).unsqueeze(1)
    return loss, slopes.scatter_(1, index, slopes.gather(1, index) - 1).to(logits.dtype)


def _loss_and_slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same without writing into tensors, which torch.compile makes into two passes over the logits."""
    exact = logits.to(_at_least_fp32(logits.dtype))
    sums = exact.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    index = targets.clamp(min=0).unsqueeze(1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == index  # (N, vocab)
    slopes = (exact - sums).exp() - is_target.to(exact.dtype)
    losses = (sums - exact.gather(1, index)).squeeze(1)
    return torch.where(targets == IGNORED, 0.0, losses).sum(), slopes.to(logits.dtype)
