"""Every engine on one GPU against a loop of plain torch on the same GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.trainer import Subject
from tests.helpers import zoo
from tests.helpers.gpu import gpt_run, plain_weights, steps, training

STEPS, SAMPLES, CLIP, LR, DECAY = 6, 10, 0.5, 3e-3, 0.1
# Matrix products of other shapes add up in another order, and AdamW makes most of it where gradients are small.
FP32 = {"loss": 2e-5, "norm": 1e-4, "weights": 5e-4}
# bf16 has 8 bits; copies of it are computed with, and the updates stay in float32.
BF16 = {"loss": 3e-2, "norm": 1e-1, "weights": 3e-2}
ENGINES = [
    {"name": "single"},
    {"name": "ddp"},
    {"name": "fsdp"},
    {"name": "deepspeed", "deepspeed": {"stage": 2}},
]


class Samples:
    """The samples of the odd model's first step."""

    def __init__(self) -> None:
        self.tokens, self.labels = zoo.global_batch(0)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]


def odd() -> zoo.Odd:
    return zoo.make_odd(empty=False)


def by_hand() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The mean loss of all samples in every step, in float32."""
    device = torch.device("cuda", 0)
    model = odd().to(device)
    tokens, labels = (part.to(device) for part in zoo.global_batch(0))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.ndim > 1 and "norm" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in named if p.ndim < 2 or "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return seen, {name: p.detach().cpu() for name, p in named}


def run_of(engine: dict[str, Any], precision: str) -> dict[str, Any]:
    return {
        "data": {"name": "given:Samples", "eval": "none", "batch_size": SAMPLES},
        "model": "given:odd",
        "task": "classification",
        "train": {"steps": STEPS, "micro_batch_size": 4},
        "optim": {"lr": LR, "weight_decay": DECAY, "clip_grad_norm": CLIP},
        "precision": precision,
        "engine": {**engine, "device": "cuda"},
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine["name"])
def test_an_engine_trains_as_plain_torch_does(engine: dict[str, Any], precision: str) -> None:
    if engine["name"] == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    tolerance = FP32 if precision == "fp32" else BF16
    subject = Subject(model=odd, data=(Samples(), None))
    computed_in = set()
    with training(run_of(engine, precision), subject) as built:
        built.model.layers[0].norm.register_forward_hook(lambda m, args, out: computed_in.add(out.dtype))
        ours = steps(built, STEPS)
        weights = plain_weights(built)
    theirs, reference = by_hand()
    assert computed_in == {torch.float32 if precision == "fp32" else torch.bfloat16}
    for step, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert zoo.relative(mine[0], plain[0]) < tolerance["loss"], f"loss of step {step}: {mine[0]}, {plain[0]}"
        assert zoo.relative(mine[1], plain[1]) < tolerance["norm"], f"norm of step {step}: {mine[1]}, {plain[1]}"
    assert zoo.distance(weights, reference) < tolerance["weights"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_gpt_has_the_losses_of_the_single_engine(engine: str) -> None:
    """Also where a model is filled shard by shard, and its rotary tables are made on the GPU."""
    losses = {}
    for name in ("single", engine):
        with training(gpt_run(name)) as built:
            losses[name] = steps(built, STEPS)
    for ours, theirs in zip(losses[engine], losses["single"], strict=True):
        assert zoo.relative(ours[0], theirs[0]) < 1e-3
        assert zoo.relative(ours[1], theirs[1]) < 1e-2


def test_shards_on_the_host_train_as_shards_on_the_gpu() -> None:
    losses = []
    for offload in (False, True):
        engine = {"name": "fsdp", "device": "cuda", "fsdp": {"cpu_offload": offload}}
        with training(gpt_run("fsdp", engine=engine)) as built:
            losses.append(steps(built, STEPS))
            places = {p.device.type for p in built.model.parameters()}
            assert places == {"cpu" if offload else "cuda"}
    for ours, theirs in zip(*losses, strict=True):
        assert zoo.relative(ours[0], theirs[0]) < 1e-3
        assert zoo.relative(ours[1], theirs[1]) < 1e-2
