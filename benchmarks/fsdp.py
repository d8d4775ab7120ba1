"""bigtrain's fsdp engine beside a `fully_shard` loop by hand, and auto's choice beside the plain module.

    python benchmarks/fsdp.py [--rounds 6] [--steps 40]

1. A small gpt on two gloo ranks with one thread each: the same model, data, AdamW, clipping, schedule and check for
   numbers that are not finite, by hand and with bigtrain.
2. The same model in one process with two threads: a plain loop by hand and bigtrain with engine auto, which is single.

Both trainings live in the same processes and take turns, so many steps each (A B B A); the table shows medians of the
turns' medians, their spread, and the median of the ratio of neighbouring turns.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bigtrain.config.loader import from_dict
from bigtrain.dist import World, join
from bigtrain.loop import Loop
from bigtrain.models.gpt import GPT
from bigtrain.processes import run_ranks
from bigtrain.trainer import Subject, assemble

ARGS = {"vocab": 257, "layers": 3, "width": 128, "heads": 4, "kv_heads": 4, "mlp_width": 352, "context": 64}
BATCH, LR, CLIP, TOTAL = 8, 1e-3, 1.0, 100_000


def by_hand(world: World) -> Callable[[], None]:
    """A loop as PyTorch's tutorials write it; one call is one step."""
    torch.manual_seed(0)
    model = GPT(**ARGS, tied=True)
    if world.size > 1:
        mesh = init_device_mesh("cpu", (world.size,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    windows = Windows()
    sampler = torch.utils.data.DistributedSampler(windows, world.size, world.rank, drop_last=True)
    loader = torch.utils.data.DataLoader(
        windows, BATCH // world.size, sampler=sampler, drop_last=True, collate_fn=lambda batch: batch
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    state = {"step": 0}

    def step() -> None:
        batch = next(batches)["tokens"]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norm = norm.full_tensor() if world.size > 1 else norm
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * state["step"] / TOTAL)) / 2
        if math.isfinite(norm.item()):
            optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1

    return step


class Windows:
    """Windows of random tokens in memory."""

    def __init__(self) -> None:
        self.tokens = torch.randint(257, (1_000_000,), generator=torch.Generator().manual_seed(0))
        self.offsets = torch.arange(ARGS["context"] + 1)

    def __len__(self) -> int:
        return len(self.tokens) // ARGS["context"] - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens[index * ARGS["context"] + self.offsets]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        starts = torch.tensor(indices) * ARGS["context"]
        return {"tokens": self.tokens[starts[:, None] + self.offsets]}  # (B, context + 1)


def with_bigtrain(world: World) -> Callable[[], None]:
    """The same with bigtrain; one call is one step of its loop, with everything that is on by default."""
    config = from_dict(
        {
            "task": "causal_lm",
            "model": {"name": "gpt", "args": {**ARGS, "tied": True}},
            "data": {"name": "given:Windows", "eval": "none", "batch_size": BATCH},
            "train": {"steps": TOTAL},
            "optim": {"lr": LR, "clip_grad_norm": CLIP, "schedule": "cosine"},
            "engine": {"name": "auto"},
        }
    ).config
    loop: Loop = assemble(config, world, Subject(data=Windows())).loop()
    return loop._one_step


def take_turns(rounds: int, steps: int) -> list[tuple[float, float]]:
    """Median step times in milliseconds of (by hand, bigtrain), round by round; on every rank."""
    with join("cpu", needs_group=False) as world:
        candidates = [by_hand(world), with_bigtrain(world)]
        for step in candidates:
            for _ in range(10):
                step()
        results = []
        for number in range(rounds):
            times = [0.0, 0.0]
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                times[which] = timed(candidates[which], steps, world)
            results.append((times[0], times[1]))
        return results


def timed(step: Callable[[], None], steps: int, world: World) -> float:
    """The median time of a step."""
    times = []
    if world.size > 1:
        dist.barrier()
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| | by hand, ms a step | bigtrain, ms a step | ratio, median (lowest to highest) |\n|---|---|---|---|")
    for label, world_size in (("fsdp, 2 gloo ranks", 2), ("auto (single), one process", 1)):
        pairs = run_ranks(take_turns, world_size, (arguments.rounds, arguments.steps), timeout_s=1200)[0]
        hand, ours = zip(*pairs, strict=True)
        ratios = [b / a for a, b in pairs]
        shown = [f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in (hand, ours)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {label} | {shown[0]} | {shown[1]} | {spread} |")


if __name__ == "__main__":
    main()
