"""A run that changes what it trains twice, and the same training in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bigtrain.config.loader import from_dict
from bigtrain.config.schema import Config
from bigtrain.trainer import build_data, prepare_whole
from tests.helpers import resuming

STEPS = 12
FINETUNE = {
    "freeze": ["embed_tokens.*", "layers.*", "norm.*"],
    "unfreeze": [
        {"at_epoch": 4, "match": ["layers.1.*", "norm.*"], "lr_scale": 0.5},
        {"at_epoch": 8, "match": "layers.0.self_attn.*", "lr_scale": 0.25},
        {"at_epoch": 8, "match": "layers.1.*", "lr_scale": 0.125},
    ],
}
LR = 0.01


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small gpt that trains from the top. Every step takes all 11 windows, so a step is an epoch in any order."""
    made = resuming.config(folder, **{"finetune": FINETUNE, **changes})
    made["model"]["args"] |= {"tied": False, "dropout": 0.0}
    made["data"]["batch_size"] = 16
    made["train"] = {"steps": STEPS, "micro_batch_size": 4}
    made["optim"] = changes.get("optim", {"lr": LR, "weight_decay": 0.1, "clip_grad_norm": 0.5})
    return made


def factor(name: str, step: int) -> float | None:
    """What a parameter's rate is multiplied by in a step, from 0; None while it is frozen. By hand, from FINETUNE."""
    if name.startswith("lm_head"):
        return 1.0
    if name.startswith("layers.1."):
        return None if step < 4 else 0.5 if step < 8 else 0.125
    if name == "norm.weight":
        return None if step < 4 else 0.5
    if name.startswith("layers.0.self_attn."):
        return None if step < 8 else 0.25
    return None


def train_plainly(values: dict[str, Any]) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and norm of each step, and the weights in the end, by a loop as a textbook would write it."""
    made: Config = from_dict(values).config
    model = prepare_whole(made)
    dataset = build_data(made).train
    batch: Any = dataset.__getitems__(list(range(len(dataset))))  # type: ignore[attr-defined]
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    named = dict(model.named_parameters())
    optimizers: dict[str, torch.optim.Optimizer] = {}
    sgd = made.optim.name == "sgd"
    results = []
    for step in range(STEPS):
        for name, p in named.items():
            scale = factor(name, step)
            p.requires_grad_(scale is not None)
            if scale is not None and name not in optimizers:
                decay = 0.1 if p.ndim > 1 else 0.0
                cls: Any = torch.optim.SGD if sgd else torch.optim.AdamW
                optimizers[name] = cls([p], lr=LR, weight_decay=decay, foreach=False, **made.optim.args)
            if scale is not None:
                optimizers[name].param_groups[0]["lr"] = LR * scale
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.grad is not None], 0.5)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results, {name: p.detach() for name, p in named.items()}
