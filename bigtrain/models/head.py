"""The output layer of a language model, and its cross-entropy without the logits of all tokens at once.

Logits of a microbatch, tokens × vocabulary, are often the largest tensor of a training; kept in float32 beside their
gradient they take more memory than many a model. The loss must then be computed where the layer's weight is: under
FSDP2 and ZeRO-3 it is whole only while the module that owns it runs forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # torch's default for a target that does not count

# Elements, 0.5 GiB in float32. A chunk of fewer tokens would spend more time on adding up the weight's gradient than on
# multiplying, where the vocabulary is large; up to here logits are computed at once.
MOST_LOGITS = 1 << 27


class Head(nn.Linear):
    """Logits of hidden states, or at once the sum of the cross-entropies of their targets.

    Args:
        width: Elements of a hidden state.
        vocab: Tokens.
    """

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__(width, vocab, bias=False)

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
        if len(targets) * self.out_features <= MOST_LOGITS:
            return _cross_entropy(F.linear(hidden, self.weight), targets)[1]
        tokens = max(1, MOST_LOGITS // self.out_features)
        trains = torch.is_grad_enabled()
        wanted = (trains and hidden.requires_grad, trains and self.weight.requires_grad)
        total: Tensor = _ChunkedCrossEntropy.apply(hidden, self.weight, targets, tokens, wanted)
        return total


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
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tokens: int, wanted: tuple[bool, bool]
    ) -> Tensor:
        exact = _at_least_fp32(hidden.dtype)
        total = hidden.new_zeros((), dtype=exact)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for start in range(0, len(targets), tokens):
            rows = slice(start, start + tokens)
            scores, loss = _cross_entropy(F.linear(hidden[rows], weight), targets[rows])
            total += loss
            if not any(wanted):
                continue
            slopes = _slopes(scores, targets[rows]).to(hidden.dtype)  # (n, vocab)
            del scores
            ignored = (targets[rows] == IGNORED).unsqueeze(1)
            if to_hidden is not None:
                to_hidden[rows] = (slopes @ weight).masked_fill_(ignored, 0)
            if to_weight is not None:
                to_weight += slopes.mT @ hidden[rows].masked_fill(ignored, 0)
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else saved * gradient for saved in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _slopes(scores: Tensor, targets: Tensor) -> Tensor:
    """Derivatives of each token's loss by its logits, softmax - one at the target; overwrites the log-probabilities."""
    slopes = scores.exp_()
    index = targets.clamp(min=0).unsqueeze(1)  # where a target does not count, its row will not either
    return slopes.scatter_(1, index, slopes.gather(1, index) - 1)
