"""The training that every engine is compared with: one process, plain torch, as a textbook would write it.

It shares no code with the engines, the loop, the loader or the optimizer's groups and schedules: a fault in one of
them must not be here as well. What it has in common with a run is what the user brings (model, data, task) and the
order of the samples.
"""

from __future__ import annotations

import fnmatch
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.config.schema import Config
from bigtrain.data.mixing import Mixing
from bigtrain.data.order import shuffled
from bigtrain.data.reading import Reader
from bigtrain.data.split import Part
from bigtrain.models.blocks import find_blocks
from bigtrain.protocols import Batch, Dataset, Task

# Two runs that differ in rounding alone disagree by more than this share on a gradient that is rounding alone.
_NOISE_SHARE = 0.01


@dataclass
class Trajectory:
    """What a plain training did.

    Attributes:
        losses: The mean loss of each step's global batch.
        norms: The gradient's norm of each step, before clipping.
        folder: Holds the parameters after each step, one file a step.
        layout: Where each parameter lies in such a file: name -> (offset in elements, shape).
        dtype: Of the files.
        gradients: Those of the first step, by name.
        frozen: The parameters that are not trained.
    """

    losses: list[float]
    norms: list[float]
    folder: Path
    layout: dict[str, tuple[int, tuple[int, ...]]]
    dtype: str
    gradients: dict[str, Tensor]
    frozen: list[str]

    def parameters(self, step: int) -> dict[str, np.ndarray]:
        """The parameters after a step, from 0, as views of the file."""
        flat = np.load(self.folder / f"step-{step}.npy", mmap_mode="r")
        return {n: flat[o : o + math.prod(shape)].reshape(shape) for n, (o, shape) in self.layout.items()}


def train_plainly(
    config: Config, model: nn.Module, task: Task, dataset: Dataset, *, steps: int, splits: int, folder: Path
) -> Trajectory:
    """Train for some steps and keep the parameters after each.

    Args:
        config: The run file.
        model: The plain module with its initial values, frozen where it should be.
        task: Gives the loss.
        dataset: The training samples.
        steps: How many steps to take.
        splits: In how many parts each global batch goes through the model.
        folder: Where to keep the parameters.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = _optimizer(config, model, named)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps_per_epoch = math.ceil(len(dataset) / config.data.batch_size)
    total_steps = config.train.steps or (config.train.epochs or 0) * steps_per_epoch
    layout, offset = {}, 0
    for name, p in model.named_parameters():
        layout[name], offset = (offset, tuple(p.shape)), offset + p.numel()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    trajectory = Trajectory([], [], folder, layout, str(next(model.parameters()).dtype), {}, frozen)
    folder.mkdir(parents=True)
    batches = _batches(config, dataset, steps_per_epoch)
    for step in range(steps):
        loss, norm, gradients = _gradient(model, task, batches(step), splits, named)
        if step == 0:
            trajectory.gradients = {name: g.clone() for name, g in gradients.items()}
        clip = config.optim.clip_grad_norm
        if clip is not None:
            # Not clip_grad_norm_: its float32 norm is off by 1e-4 for a large tensor on a CPU.
            nn.utils.clip_grads_with_norm_([p for _, p in named], clip, torch.tensor(norm, dtype=torch.float64))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _rate_factor(config, step, total_steps, steps_per_epoch)
        optimizer.step()
        if config.optim.moments == "bf16":
            _round_moments(optimizer)
        optimizer.zero_grad()
        trajectory.losses.append(loss)
        trajectory.norms.append(norm)
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        np.save(folder / f"step-{step}.npy", flat.numpy())
    return trajectory


def _gradient(
    model: nn.Module,
    task: Task,
    data: Callable[[int], Sequence[Batch]],
    splits: int,
    named: Sequence[tuple[str, Tensor]],
) -> tuple[float, float, dict[str, Tensor]]:
    """Backward through a whole global batch: its mean loss, the norm of the gradient, and the gradient by name.

    A parameter that takes no part in the loss has none, and no optimizer of torch touches it.
    """
    total, count = 0.0, 0.0
    for batch in data(splits):
        result = task.loss(model, batch)
        result.total.backward()  # type: ignore[no-untyped-call]
        total += float(result.total.detach().double())
        count += float(result.count)
    count = count or 1.0  # a batch without a target that counts has a loss and a gradient of 0
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    for gradient in gradients.values():
        gradient /= count
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return total / count, norm, gradients


def _batches(
    config: Config, dataset: Dataset, steps_per_epoch: int
) -> Callable[[int], Callable[[int], Sequence[Batch]]]:
    """A function that gives, for a step, a function that gives its global batch in so many parts."""
    order = shuffled(len(dataset), config.run.seed)
    is_part = isinstance(dataset, Part)
    wanted = config.data.mix
    mixing = Mixing(wanted.mixup, wanted.cutmix, wanted.share, config.run.seed) if wanted else None
    base = dataset.base if is_part else dataset  # type: ignore[attr-defined]
    read = Reader(base, config.run.seed, mixing=mixing)
    size = config.data.batch_size
    dtype = torch.float64 if config.precision == "fp64" else torch.float32

    def of_step(step: int) -> Callable[[int], Sequence[Batch]]:
        epoch, number = divmod(step, steps_per_epoch)
        positions = np.arange(number * size, min((number + 1) * size, len(dataset)))
        samples = order(np.full(len(positions), epoch), positions)
        indices = (dataset.locate(samples) if is_part else samples).tolist()  # type: ignore[attr-defined]

        def in_parts(splits: int) -> Sequence[Batch]:
            parts = [indices[i::splits] for i in range(splits)]
            if mixing:  # the whole batch at once, rolled by one
                whole = _cast(read(epoch, indices, indices[-1]), dtype)
                cut = [tuple(part[i::splits] for part in whole) for i in range(splits)]  # type: ignore[attr-defined]
                return [Batch(c, torch.ones(len(p)), len(p), p) for c, p in zip(cut, parts, strict=True) if p]
            return [Batch(_cast(read(epoch, p), dtype), torch.ones(len(p)), len(p), p) for p in parts if p]

        return in_parts

    return of_step


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        cast: list[Any] = [_cast(item, dtype) for item in value]
        return type(value)(*cast) if hasattr(value, "_fields") else type(value)(cast)
    return value


def _optimizer(config: Config, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """One group a parameter: rates and decay by the words of the run file."""
    optim = config.optim
    decays = _layer_decays(config, model)
    normed = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    groups = []
    for name, p in named:
        is_left_alone = p.ndim < 2 or name.endswith("bias") or id(p) in normed
        decay = 0.0 if is_left_alone and not optim.decay_norms_and_biases else optim.weight_decay
        group: dict[str, Any] = {"params": [p], "lr": optim.lr, "weight_decay": decay}
        for wanted in optim.groups:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted.match):
                group["lr"] = group["lr"] if wanted.lr is None else wanted.lr
                group["weight_decay"] = group["weight_decay"] if wanted.weight_decay is None else wanted.weight_decay
        groups.append({**group, "lr": group["lr"] * decays.get(name, 1.0)})
    own: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    module, _, attribute = optim.name.partition(":")
    cls = own.get(optim.name) or getattr(importlib.import_module(module), attribute)
    # One parameter after the other, by the plainest of torch's implementations.
    plainest = {"foreach": False} if optim.name in own else {}
    made: torch.optim.Optimizer = cls(groups, lr=optim.lr, **{**plainest, **optim.args})
    return made


@torch.no_grad()
def _round_moments(optimizer: torch.optim.Optimizer) -> None:
    """Leave in the moments of torch's Adam what bfloat16 keeps of them."""
    for state in optimizer.state.values():
        for kind in state.keys() - {"step"}:
            state[kind].copy_(state[kind].bfloat16())


def _layer_decays(config: Config, model: nn.Module) -> dict[str, float]:
    """The factor on each parameter's rate: one power of `layer_decay` for each block above it, and one for the rest."""
    if config.finetune.layer_decay is None:
        return {}
    blocks = [name + "." for name, _ in find_blocks(model)]
    names = [name for name, _ in model.named_parameters()]
    places = [[i for i, name in enumerate(names) if name.startswith(block)] for block in blocks]
    last = max(places[-1])
    return {
        name: config.finetune.layer_decay ** (1 + sum(min(place) > i for place in places))
        for i, name in enumerate(names)
        if i <= last
    }


def _rate_factor(config: Config, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The factor on the learning rate in a step, from 0."""
    plan = config.optim.schedule
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    now = step if plan.unit == "step" else step - step % steps_per_epoch
    if plan.name == "constant":
        return 1.0
    if plan.name == "step":
        units = step - plan.warmup_steps if plan.unit == "step" else step // steps_per_epoch
        return plan.gamma ** (units // plan.step_size)
    if plan.name == "wsd":
        left = (total_steps - now) / max(1, round(plan.decay * total_steps))
        return plan.min_factor + (1 - plan.min_factor) * min(1.0, left)
    done = min(1.0, max(0, now - plan.warmup_steps) / max(1, total_steps - plan.warmup_steps))
    falling = 1 - done if plan.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return plan.min_factor + (1 - plan.min_factor) * falling


def without_true_gradient(one: Trajectory, other: Trajectory) -> list[str]:
    """Parameters whose gradient is rounding alone: two runs that differ in nothing else disagree on all of it.

    The bias of an attention key is one: its gradient is zero, and Adam makes steps of full size out of the rounding.
    """
    names = []
    for name, gradient in one.gradients.items():
        norm = float(gradient.double().norm())
        theirs = other.gradients.get(name, torch.zeros_like(gradient))
        if norm > 0 and float((gradient - theirs).double().norm()) > _NOISE_SHARE * norm:
            names.append(name)
    return names
