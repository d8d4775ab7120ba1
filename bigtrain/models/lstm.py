"""A recurrent language model: the baseline that a decoder has to beat.

Each layer is an `nn.LSTM` of its own, so that it can be sharded and its activations computed again like any other
repeated part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigtrain.models.checks import check_positive, check_share
from bigtrain.models.head import Head


class Layer(nn.Module):
    """One recurrent layer; what is dropped is dropped between layers, not between steps (Zaremba et al., 2014)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, width) to the same shape; every sequence begins with a state of zeros."""
        states, _ = self.lstm(x)  # a view of (T, B, width), and FSDP2 warns of a block that returns a view
        out: Tensor = self.dropout(states.clone(memory_format=torch.contiguous_format))
        return out


class LSTM(nn.Module):
    """A stack of LSTM layers over tokens.

    Args:
        vocab: Tokens.
        layers: LSTM layers.
        width: Elements of a token's vector and of each layer's state.
        context: Tokens of a sample, by which its cost is counted; longer sequences are fine.
        tied: Whether the output layer is the embedding.
        dropout: The share dropped of embeddings and of what each layer gives on.

    Raises:
        ModelError: Where a size is none.
    """

    def __init__(
        self, *, vocab: int, layers: int, width: int, context: int, tied: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(vocab=vocab, layers=layers, width=width, context=context)
        check_share(dropout=dropout)
        self.width, self.context, self.tied = width, context, tied
        self.embed_tokens = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
        self.lm_head = Head(width, vocab)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            self.init_tensor(name, parameter)

    def forward(self, tokens: Tensor, sum_cross_entropy_of: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) for the token after each.

        Args:
            tokens: (B, T) int64.
            sum_cross_entropy_of: (B, T) int64, the targets; -100 does not count. With it the sum of their
                cross-entropies, of shape (), is returned; large logits are computed in chunks.
        """
        x = self.dropout(self.embed_tokens(tokens))  # (B, T, width)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.lm_head(x, sum_cross_entropy_of)
        return out

    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order."""
        return list(self.layers)

    def flops_per_sample(self) -> float:
        """Floating-point operations to train on one sequence of `context` tokens.

        Per token 6 for each weight that multiplies; the embedding only looks up, and biases and gates are left out.
        """
        matrices = [p for p in self.layers.parameters() if p.ndim == 2]
        weights = sum(p.numel() for p in matrices) + self.lm_head.weight.numel()
        return float(6 * self.context * weights)

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fill a piece of any parameter with initial values, from torch's default generator.

        They are torch's defaults for these layers: an embedding is normal with a deviation of 1, all else uniform
        within ±1/√width. An embedding that is the output layer as well begins as an output layer: its logits would
        be √width times too large.
        """
        with torch.no_grad():
            if name == "embed_tokens.weight" and not self.tied:
                tensor.normal_()
            else:
                bound = self.width**-0.5
                tensor.uniform_(-bound, bound)
