"""A decoder of today's shape: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters have the names and shapes of Llama's (its names without their leading `model.`) and rotary
positions follow its convention, so its weights fit one to one. No dtype is written down: the parameters' own
is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.errors import ModelError
from bigtrain.models.checks import check_positive, check_share
from bigtrain.models.head import Head


class Layout(NamedTuple):
    """Where the documents of packed sequences lie.

    Attributes:
        positions: (B, T) int64, each token's position in its own document.
        mask: (B, 1, T, T) bool, [b, 0, i, j] says whether token i may attend to token j.
    """

    positions: Tensor
    mask: Tensor


def document_layout(documents: Tensor) -> Layout:
    """The layout of sequences in which neighbouring tokens with the same number are one document.

    Args:
        documents: (B, T) integers.
    """
    index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    positions = positions_in_documents(documents)  # (B, T)
    first = index - positions  # (B, T), where each token's document begins
    same = first[:, :, None] == first[:, None, :]  # (B, T, T)
    causal = index[:, None] >= index[None, :]  # (T, T)
    return Layout(positions, (same & causal).unsqueeze(1))


def positions_in_documents(documents: Tensor) -> Tensor:
    """Each token's position in its own document, (B, T) int64, for the numbers of documents (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
    return index - (index * begins).cummax(dim=1).values


class Rotary(nn.Module):
    """Rotary positions (Su et al., RoFormer, 2021); elements i and i + head_dim/2 turn together, as in Llama.

    The tables are computed in float64 and kept in float32, or in float64 in a float64 model; never in less,
    because bfloat16 cannot tell neighbouring positions apart. They are in no checkpoint: whatever moves or
    casts the model computes them anew.

    Args:
        head_dim: Elements of one head; even.
        context: Positions in the tables.
        theta: The base of the frequencies.
    """

    cos: Tensor  # (context, head_dim / 2)
    sin: Tensor

    def __init__(self, head_dim: int, context: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.context, self.theta = head_dim, context, theta
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(context, head_dim // 2), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the tables, on the device of the present ones and in their precision."""
        if self.cos.is_meta:
            return
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        positions = torch.arange(self.context, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, self.theta**-exponents)
        dtype = torch.float64 if self.cos.dtype == torch.float64 else torch.float32
        self.cos, self.sin = (f(angles).to(self.cos.device, dtype) for f in (torch.cos, torch.sin))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.cos
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos is not before:  # cast, moved, or given empty memory
            self.reset()
        return self

    def forward(self, heads: Tensor, positions: Tensor | None) -> Tensor:
        """Rotate heads (B, H, T, head_dim) by their positions (B, T), or by 0 … T-1."""
        if positions is None:
            # (T, head_dim / 2)
            cos, sin = self.cos[: heads.shape[2]], self.sin[: heads.shape[2]]
        else:
            # (B, 1, T, head_dim / 2)
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        first, second = heads.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(heads.dtype)


class Attention(nn.Module):
    """Causal self-attention; groups of query heads share a key and value head (Ainslie et al., GQA, 2023)."""

    rotary: Rotary

    def __init__(self, width: int, heads: int, kv_heads: int, rotary: Rotary, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, rotary.head_dim
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        # Past Module.__setattr__: the tables are the decoder's, once. Nor do they come through forward, where
        # FSDP2 would cast them with the other inputs of a block.
        object.__setattr__(self, "rotary", rotary)

    def forward(self, x: Tensor, layout: Layout | None) -> Tensor:
        """Attend within x (B, T, width)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._split(projection(x)) for projection in projections)  # (B, heads, T, head_dim)
        positions, mask = layout or (None, None)
        # Not by call: what an engine hooks to the decoder's tables would cut a compiled block in two.
        q, k = self.rotary.forward(q, positions), self.rotary.forward(k, positions)
        group = self.heads // self.kv_heads
        if group > 1 and mask is not None:
            # Flash attention takes no mask and the memory-efficient kernel no groups: what is left would
            # write out scores of (B, heads, T, T).
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            group = 1
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=group > 1
        )
        out: Tensor = self.dropout(self.o_proj(y.transpose(1, 2).flatten(2)))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """A linear map gated by the SiLU of another (SwiGLU; Shazeer, GLU Variants Improve Transformer, 2020)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, width) to the same shape."""
        out: Tensor = self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer; each takes the norm of what comes in, and its result is added."""

    def __init__(self, attention: Attention, mlp: FeedForward, width: int, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, layout: Layout | None) -> Tensor:
        """Map x (B, T, width) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), layout)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        vocab: Tokens.
        layers: Blocks.
        width: Elements of a token's vector.
        heads: Query heads; they divide the width, and a head's share of it is even.
        context: The longest sequence.
        kv_heads: Key and value heads; they divide the query heads. As many as those by default.
        mlp_width: Hidden elements of the feed-forward layers. By default 8/3 of the width, rounded up to a
            multiple of
            64: three matrices then have the weights of the classic two of 4 · width.
        tied: Whether the output layer is the embedding.
        dropout: The share dropped of embeddings, of attention weights, and of what each layer adds.
        rope_theta: The base of the rotary frequencies.
        norm_eps: Added to the mean square in norms.

    Raises:
        ModelError: Where sizes do not fit together.
    """

    def __init__(
        self,
        *,
        vocab: int,
        layers: int,
        width: int,
        heads: int,
        context: int,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        tied: bool = False,
        dropout: float = 0.0,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_positive(vocab=vocab, layers=layers, width=width, heads=heads, context=context)
        kv_heads = heads if kv_heads is None else kv_heads
        hidden = 64 * math.ceil(width * 8 / 3 / 64) if mlp_width is None else mlp_width
        check_positive(kv_heads=kv_heads, mlp_width=hidden)
        _check_heads(width, heads, kv_heads)
        check_share(dropout=dropout)
        self.vocab, self.num_layers, self.width, self.context = vocab, layers, width, context
        self.rotary = Rotary(width // heads, context, rope_theta)
        self.embed_tokens = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            attention = Attention(width, heads, kv_heads, self.rotary, dropout)
            self.layers.append(Block(attention, FeedForward(width, hidden, dropout), width, norm_eps))
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.lm_head = Head(width, vocab)
        # Counted now: ZeRO-3 leaves parameters without elements.
        self._multiplying = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2) + vocab * width
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            self.init_tensor(name, parameter)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sum_cross_entropy_of: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, vocab) for the token after each.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) integers; neighbours with the same number are one document. Tokens attend only
                within their document, and positions begin anew in each. Without it a sequence is one
                document.
            sum_cross_entropy_of: (B, T) int64, the targets; -100 does not count. With it the sum of their
                cross-entropies, of shape (), is returned; large logits are computed in chunks.

        Raises:
            ModelError: Where the sequence is longer than the context.
        """
        if tokens.shape[1] > self.context:
            raise ModelError(
                f"sequences of {tokens.shape[1]} tokens reach a model with a context of {self.context}",
                where="model.args.context",
                remedy="make model.args.context at least data.args.context",
            )
        layout = None if documents is None else document_layout(documents)
        x = self.dropout(self.embed_tokens(tokens))  # (B, T, width)
        for block in self.layers:
            x = block(x, layout)
        out: Tensor = self.lm_head(self.norm(x), sum_cross_entropy_of)
        return out

    def blocks(self) -> Sequence[nn.Module]:
        """The decoder's blocks, in order."""
        return list(self.layers)

    def flops_per_sample(self, *, full_square: bool = False) -> float:
        """Floating-point operations to train on one sequence of `context` tokens.

        Per token 6 for each weight that multiplies; the embedding only looks up. In attention's two products a token
        meets itself and those before it, (context + 1) / 2 on average, at 12 · layers · width each. What is computed
        again for activation checkpointing does not count.

        Args:
            full_square: Count the masked half as well, 12 · layers · width · context per token, as much of the
                literature does (Chowdhery et al., PaLM, 2022, appendix B): the larger number.
        """
        met = self.context if full_square else (self.context + 1) / 2
        return float(self.context * (6 * self._multiplying + 12 * self.num_layers * self.width * met))

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fill a piece of the parameter `name` with initial values, from torch's default generator.

        Norms are 1, all else is normal with a deviation of 0.02. What the two layers of a block add to the
        residual stream is made smaller by √(2 · layers) (Radford et al., GPT-2, 2019, section 2.3).
        """
        with torch.no_grad():
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
                return
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensor.normal_(0.0, 0.02 / math.sqrt(2 * self.num_layers) if adds else 0.02)

    def reset_buffers(self) -> None:
        """Compute the rotary tables anew, where buffers got memory by other ways than `to` and `to_empty`."""
        self.rotary.reset()


def _check_heads(width: int, heads: int, kv_heads: int) -> None:
    if width % heads or (width // heads) % 2:
        raise ModelError(
            f"a width of {width} over {heads} heads is {width / heads:g} each",
            where="model.args.width",
            remedy="make the width an even multiple of the heads: rotary positions turn pairs of elements",
        )
    if heads % kv_heads:
        raise ModelError(
            f"{kv_heads} key and value heads cannot be shared evenly by {heads} query heads",
            where="model.args.kv_heads",
            remedy="let kv_heads divide heads",
        )
