"""A model with every oddity that engines trip over, data for it, and a plain loop to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bigtrain.protocols import Batch, LossSum

VOCAB, WIDTH = 13, 8
BATCH = 10


class OddBlock(nn.Module):
    """Two linear layers, a norm, and a prime dimension between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 17)
        self.down = nn.Linear(17, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, WIDTH)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Odd(nn.Module):
    """Weights tied in the root and across blocks, a block used twice, a scalar, a parameter of 3 rows and one of none.

    And a buffer that is saved, and one that is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(OddBlock() for _ in range(4))
        self.layers[3].up.weight = self.layers[2].up.weight
        self.order = (0, 1, 2, 1, 3)
        self.mix = nn.Parameter(torch.randn(3, WIDTH) * 0.1)
        self.nothing: nn.Parameter | None = nn.Parameter(torch.zeros(0, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, WIDTH))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, tokens: Tensor) -> Tensor:  # (B,) -> (B, VOCAB)
        x = self.embed(tokens)
        x = x + (self.shift * self.scratch).to(x.dtype)
        for number in self.order:
            x = self.layers[number](x)
        x = x + F.linear(F.linear(x, self.mix), self.mix.T)
        if self.nothing is not None:
            x = x + self.nothing.sum()
        return self.head(x) * self.temperature


class OddTask:
    """Cross-entropy."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        tokens, labels = batch.data
        losses = F.cross_entropy(model(tokens), labels, reduction="none")
        return LossSum((losses * batch.weight).sum(), batch.weight.sum())


def make_odd(frozen: bool = False, dtype: torch.dtype = torch.float32, empty: bool = True) -> Odd:
    """The odd model; without the parameter of no elements where it is not `empty`."""
    torch.manual_seed(5)
    model = Odd().to(dtype)
    if not empty:
        model.nothing = None
    if frozen:
        model.layers[0].requires_grad_(False)
        model.layers[2].up.requires_grad_(False)
    return model


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """The samples of one step; the last step of each five is a short one."""
    generator = torch.Generator().manual_seed(1000 + step)
    n = 3 if step % 5 == 4 else BATCH
    return torch.randint(VOCAB, (n,), generator=generator), torch.randint(VOCAB, (n,), generator=generator)


def my_microbatches(step: int, rank: int, world_size: int, accumulation: int) -> list[Batch]:
    """This rank's part of a step, in `accumulation` microbatches; an empty one repeats a sample with weight 0."""
    tokens, labels = global_batch(step)
    mine = torch.arange(len(tokens)).tensor_split(world_size)[rank]
    batches = []
    for part in mine.tensor_split(accumulation):
        index = part if len(part) else mine[-1:] if len(mine) else torch.tensor([0])
        weight = torch.ones(len(index)) if len(part) else torch.zeros(1)
        batches.append(Batch((tokens[index], labels[index]), weight, len(part), index.tolist()))
    return batches


# lr, betas … chosen so that clipping bites and decay matters; two groups with rates of their own.
ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "groups": [{"match": "layers.1.*", "lr": 1e-2}]}
BF16_MOMENTS = {**ADAMW, "moments": "bf16", "args": {"betas": [0.9, 0.95]}}
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 0.01, "args": {"momentum": 0.9, "nesterov": True}}
CLIP = 0.5


class Normalised(torch.optim.Optimizer):
    """An update that depends on the whole parameter: its gradient by its norm."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(p.grad / (p.grad.norm() + 0.01), alpha=-group["lr"])


NORMALISED = {"name": f"{__name__}:Normalised", "lr": 0.02, "weight_decay": 0.1}


def lr_factor(step: int) -> float:
    return 0.5 + 0.5 * math.cos(step / 7)


def plain_loop(
    model: Odd, steps: int, *, start: int = 0, optim: dict[str, Any] = ADAMW, bf16_parts: tuple[int, int] | None = None
) -> tuple[list[tuple[float, float]], Any]:
    """Train with torch alone, whole batches, the mean loss: (loss, norm) of every step, and the optimizer.

    With `bf16_parts`, forward and backward go through bf16 copies of the parameters, in the parts that so many ranks
    make in so many microbatches: bf16 rounds otherwise in other parts.
    """
    undecayed = lambda name, p: p.ndim < 2 or "norm" in name  # noqa: E731
    fast = lambda name: name.startswith("layers.1.") and "groups" in optim  # noqa: E731
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p],
            "lr": optim["groups"][0]["lr"] if fast(n) else optim["lr"],
            "weight_decay": 0.0 if undecayed(n, p) else optim["weight_decay"],
        }
        for n, p in named
    ]
    cls = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}.get(optim["name"], Normalised)
    optimizer = cls(groups, lr=optim["lr"], **optim.get("args", {}))
    rates = [group["lr"] for group in groups]
    seen = []
    for step in range(start, start + steps):
        tokens, labels = global_batch(step)
        optimizer.zero_grad()
        if bf16_parts:
            loss = _bf16_gradient(model, step, *bf16_parts)
        else:
            loss = F.cross_entropy(model(tokens), labels)
            loss.backward()
        norm = nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step)
        optimizer.step()
        if optim.get("moments") == "bf16":
            round_moments(optimizer)
        seen.append((loss.item(), norm.item()))
    return seen, optimizer


def round_moments(optimizer: torch.optim.Optimizer) -> None:
    """Leave in the moments of torch's Adam what bfloat16 keeps of them."""
    for state in optimizer.state.values():
        for moment in (value for kind, value in state.items() if kind != "step"):
            moment.copy_(moment.bfloat16())


def _bf16_gradient(model: Odd, step: int, world_size: int, accumulation: int) -> Tensor:
    total = torch.zeros(())
    for rank in range(world_size):
        for batch in my_microbatches(step, rank, world_size, accumulation):
            tokens, labels = batch.data
            copies = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
            logits = functional_call(model, copies, (tokens,), tie_weights=True).float()
            loss = (F.cross_entropy(logits, labels, reduction="none") * batch.weight).sum()
            loss.backward()
            total += loss.detach()
    count = len(global_batch(step)[0])
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= count
    return total / count


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """All tensors together: the norm of the difference over the norm."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in theirs)
    return math.sqrt(difference / sum(float(t.double().square().sum()) for t in theirs.values()))


def concatenated(batches: Sequence[Batch]) -> int:
    return sum(batch.num_valid for batch in batches)
