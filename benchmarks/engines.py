"""bigtrain's engines beside loops by hand on the bare libraries, and beside one another.

    python benchmarks/engines.py [--runs 3] [--rounds 6] [--steps 40] [--size small|medium]

1. A small gpt on two gloo ranks with one thread each: the same model, data, AdamW, clipping, schedule and check for
   numbers that are not finite, by hand (`fully_shard`; DeepSpeed's own engine in stages 1 to 3) and with bigtrain.
2. The same model in one process with two threads: a plain loop by hand and bigtrain with engine auto, which is single.
3. ddp, fsdp and deepspeed's stages with bigtrain, and what each holds for weights, gradients and optimizer state.

All trainings of a row live in the same processes and take turns, so many steps each (A B B A); the tables show medians
of the turns' medians, their spread, and the median of the ratio of neighbouring turns. Where a training's tensors lie
is worth some percent: so there are several runs, with new processes, and who is built first alternates.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bigtrain.config.loader import from_dict
from bigtrain.dist import World, join
from bigtrain.explain import explain
from bigtrain.loop import Loop
from bigtrain.models.gpt import GPT
from bigtrain.processes import run_ranks
from bigtrain.trainer import Subject, assemble

ARGS = {"vocab": 257, "layers": 3, "width": 128, "heads": 4, "kv_heads": 4, "mlp_width": 352, "context": 64}
# What a framework adds to a step does not grow with the model: a share says little without the step's length.
SIZES = {"small": {}, "medium": {"layers": 6, "width": 256, "mlp_width": 704, "context": 128}}
BATCH, LR, CLIP, TOTAL = 8, 1e-3, 1.0, 100_000


def by_hand(world: World, engine: str) -> Callable[[], None]:
    """A loop as the tutorials of PyTorch and DeepSpeed write it; one call is one step."""
    torch.manual_seed(0)
    model = GPT(**ARGS, tied=True)
    if engine == "fsdp":
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
    bare = bare_deepspeed(model, optimizer, int(engine[-1])) if engine.startswith("deepspeed") else None
    state = {"step": 0}

    def step() -> None:
        batch = next(batches)["tokens"]
        logits = (bare or model)(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * state["step"] / TOTAL)) / 2
        state["step"] += 1
        if bare is not None:
            bare.backward(loss)
            bare.step()
            return
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norm = norm.full_tensor() if engine == "fsdp" else norm
        if math.isfinite(norm.item()):
            optimizer.step()
        optimizer.zero_grad()

    return step


def bare_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """DeepSpeed's own engine, with the configuration that bigtrain gives it as far as the loop is the same."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero = {"stage": stage, "memory_efficient_linear": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


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


def run_file(engine: str) -> dict[str, Any]:
    name, _, stage = engine.partition(":")
    return {
        "task": "causal_lm",
        "model": {"name": "gpt", "args": {**ARGS, "tied": True}},
        "data": {"name": "given:Windows", "eval": "none", "batch_size": BATCH},
        "train": {"steps": TOTAL},
        "optim": {"lr": LR, "clip_grad_norm": CLIP, "schedule": "cosine"},
        "engine": {"name": name, "deepspeed": {"stage": int(stage or 3)}},
    }


def with_bigtrain(world: World, engine: str) -> Callable[[], None]:
    """The same with bigtrain; one call is one step of its loop, with everything that is on by default."""
    loop: Loop = assemble(from_dict(run_file(engine)).config, world, Subject(data=Windows())).loop()
    return loop._one_step


def take_turns(candidates: list[tuple[str, str]], rounds: int, steps: int, size: str) -> list[list[float]]:
    """Median step times in milliseconds of each candidate (by hand or bigtrain, and the engine), round by round."""
    ARGS.update(SIZES[size])
    with join("cpu", needs_group=True) as world:
        makers = {"hand": by_hand, "bigtrain": with_bigtrain}
        made = [makers[who](world, engine) for who, engine in candidates]
        for step in made:
            for _ in range(10):
                step()
        results = []
        for number in range(rounds):
            order = list(range(len(made)))
            times = dict.fromkeys(order, 0.0)
            for which in order if number % 2 == 0 else reversed(order):
                times[which] = timed(made[which], steps, world)
            results.append(list(times.values()))
        return results


def in_runs(candidates: list[tuple[str, str]], world_size: int, runs: int, *turns: Any) -> list[list[float]]:
    """`take_turns` in new processes each time, every other time built in the opposite order."""
    rounds = []
    for number in range(runs):
        way = 1 if number % 2 == 0 else -1
        taken = run_ranks(take_turns, world_size, (candidates[::way], *turns), timeout_s=1200)[0]
        rounds += [times[::way] for times in taken]
    return rounds


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


def spread(values: Iterable[float], digits: int = 1) -> str:
    """The median, the lowest and the highest."""
    values = list(values)
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def held(engine: str, world_size: int) -> str:
    """Megabytes of weights, gradients and optimizer state on the rank that holds most, as `bigtrain explain` has it."""
    run = run_file(engine)
    run["data"] = {"name": "synthetic", "args": {"kind": "causal_lm", "context": ARGS["context"]}, "eval": "none"}
    footprint = explain(from_dict(run).config, world_size=world_size).chosen
    return f"{footprint.on_device / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    turns = (arguments.runs, arguments.rounds, arguments.steps, arguments.size)
    ARGS.update(SIZES[arguments.size])
    print(f"torch {torch.__version__}, {arguments.runs} runs of {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| | by hand, ms a step | bigtrain, ms a step | ratio, median (lowest to highest) |\n|---|---|---|---|")
    stages = ("deepspeed:1", "deepspeed:2", "deepspeed:3")
    for engine, world_size in (("auto", 1), ("fsdp", 2), *((stage, 2) for stage in stages)):
        rounds = in_runs([("hand", engine), ("bigtrain", engine)], world_size, *turns)
        hand, ours = zip(*rounds, strict=True)
        ratio = spread((b / a for a, b in rounds), 3)
        label = "auto (single), one process" if engine == "auto" else f"{engine}, 2 gloo ranks"
        print(f"| {label} | {spread(hand)} | {spread(ours)} | {ratio} |", flush=True)
    print("\n| bigtrain, 2 gloo ranks | ms a step | ratio to ddp | MB a rank |\n|---|---|---|---|")
    engines = ("ddp", "fsdp", *stages)
    rounds = in_runs([("bigtrain", engine) for engine in engines], 2, *turns)
    for engine, times in zip(engines, zip(*rounds, strict=True), strict=True):
        ratio = spread((row[engines.index(engine)] / row[0] for row in rounds), 2)
        print(f"| {engine} | {spread(times)} | {ratio} | {held(engine, 2)} |", flush=True)


if __name__ == "__main__":
    main()
