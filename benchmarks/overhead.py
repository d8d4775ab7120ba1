"""Host time that frameworks add to a training step, beside a loop by hand.

    python benchmarks/overhead.py [--rounds 4] [--steps 600]

bigtrain, Accelerate, Lightning and transformers' Trainer on a small model and one CPU thread, so that the step itself
is short. Every candidate trains the same model on the same data with AdamW in two groups (biases are not decayed), a
cosine schedule with warm-up, clipping, a check for numbers that are not finite and a line of numbers every ten steps.
The time of a step is the time between two calls of the model's forward. Candidates run one after the other and then
backwards (A B C C B A), in one process; the table shows the median of the rounds' medians and their spread. What is not
installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigtrain

SAMPLES, INPUTS, CLASSES, BATCH, WARMUP, LR, CLIP = 4096, 64, 10, 32, 50, 1e-3, 1.0
SETTLING = 100  # steps that are not counted


class Timed(nn.Module):
    """Two layers, and the time of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        self.times: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:  # (B, INPUTS) -> (B, CLASSES)
        """Logits, (B, CLASSES)."""
        self.times.append(time.perf_counter())
        return self.layers(inputs)


class Samples(torch.utils.data.Dataset[Any]):
    """Random inputs and labels in memory."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SAMPLES, INPUTS, generator=generator)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        where = torch.tensor(indices)
        return self.inputs[where], self.labels[where]


def factor(steps: int) -> Callable[[int], float]:
    """The cosine with warm-up, as a function of the step."""

    def of(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2

    return of


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that leaves biases undecayed, as bigtrain and Trainer do by default."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, fused=True)


def by_hand(model: Timed, steps: int, folder: Path) -> None:
    """What people write: torch's DataLoader and the features above."""
    loader = torch.utils.data.DataLoader(Samples(), batch_size=BATCH, shuffle=True, collate_fn=lambda batch: batch)
    _loop(model, steps, folder, lambda: iter(loader))


def by_hand_without_loader(model: Timed, steps: int, folder: Path) -> None:
    """The least there can be: indexing two tensors that happen to be in memory."""
    data = Samples()

    def batches() -> Any:
        for where in torch.randperm(SAMPLES).split(BATCH):
            yield data.inputs[where], data.labels[where]

    _loop(model, steps, folder, batches)


def _loop(model: Timed, steps: int, folder: Path, batches: Callable[[], Any]) -> None:
    optimizer, parameters, rate = adamw(model), list(model.parameters()), factor(steps)
    log, step = (folder / "hand.jsonl").open("w"), 0
    while step < steps:
        for inputs, labels in batches():
            if step == steps:
                break
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            lr = LR * rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(norm.item() + loss.item()):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                log.write(json.dumps({"step": step, "loss": loss.item(), "norm": norm.item(), "lr": lr}) + "\n")
                log.flush()


def with_bigtrain(model: Timed, steps: int, folder: Path) -> None:
    run = {
        "run": {"dir": str(folder), "name": "bigtrain"},
        "data": {"batch_size": BATCH, "eval": "none"},
        "train": {"steps": steps},
        "optim": {"lr": LR, "clip_grad_norm": CLIP, "schedule": {"name": "cosine", "warmup_steps": WARMUP}},
        "task": "classification",
        "track": {"progress": "none"},
    }
    bigtrain.train(run, model=model, data=Samples())


def with_accelerate(model: Timed, steps: int, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=BATCH, shuffle=True, collate_fn=lambda batch: batch)
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(steps))
    wrapped, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    log, step = (folder / "accelerate.jsonl").open("w"), 0
    while step < steps:
        for inputs, labels in loader:
            if step == steps:
                break
            with accelerator.accumulate(wrapped):
                loss = F.cross_entropy(wrapped(inputs), labels)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
                if math.isfinite(norm.item() + loss.item()):
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                log.write(json.dumps({"step": step, "loss": loss.item(), "norm": norm.item()}) + "\n")
                log.flush()


def with_lightning(model: Timed, steps: int, folder: Path) -> None:
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = adamw(model)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # Lightning clips with fused optimizers only by hand.
            norm = nn.utils.clip_grad_norm_(self.parameters(), CLIP)
            if not math.isfinite(norm.item()):
                raise FloatingPointError

    loader = torch.utils.data.DataLoader(Samples(), batch_size=BATCH, shuffle=True, collate_fn=lambda batch: batch)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, log_every_n_steps=10, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(str(folder)),
    )  # fmt: skip
    trainer.fit(Module(), loader)


def with_transformers(model: Timed, steps: int, folder: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class File(TrainerCallback):
        log = (folder / "trainer.jsonl").open("w")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.log.write(json.dumps(logs) + "\n")
            self.log.flush()

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR,
        warmup_steps=WARMUP, lr_scheduler_type="cosine", max_grad_norm=CLIP, logging_steps=10, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, optim="adamw_torch_fused", remove_unused_columns=False,
    )  # fmt: skip
    data = Samples()
    rows = [{"inputs": data.inputs[i], "labels": data.labels[i]} for i in range(SAMPLES)]

    def collate(samples: list[Any]) -> Any:
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("inputs", "labels")}

    trainer = Trainer(Wrapped(), arguments, train_dataset=rows, data_collator=collate, callbacks=[File()])
    trainer.train()


CANDIDATES = {
    "by hand": (by_hand, ["torch"]),
    "by hand without a loader": (by_hand_without_loader, ["torch"]),
    "bigtrain": (with_bigtrain, ["bigtrain"]),
    "Accelerate": (with_accelerate, ["accelerate"]),
    "Lightning": (with_lightning, ["lightning"]),
    "transformers' Trainer": (with_transformers, ["transformers", "accelerate"]),
}


def measure(train: Callable[[Timed, int, Path], None], steps: int) -> float:
    """The median time of a step, in microseconds."""
    torch.manual_seed(0)
    model = Timed()
    with tempfile.TemporaryDirectory() as folder:
        train(model, steps, Path(folder))
    times = model.times[-(steps - SETTLING) :]
    return statistics.median(b - a for a, b in itertools.pairwise(times)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", default="", help="names of candidates, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    wanted = [name for name in arguments.only.split(",") if name] or list(CANDIDATES)
    found = {
        name: train
        for name, (train, packages) in CANDIDATES.items()
        if name in wanted and all(map(importlib.util.find_spec, packages))
    }
    results: dict[str, list[float]] = {name: [] for name in found}
    for number in range(arguments.rounds):
        for name in list(found) if number % 2 == 0 else reversed(found):
            results[name].append(measure(found[name], arguments.steps))
    base = statistics.median(results["by hand"])
    print(f"\ntorch {torch.__version__}, {arguments.rounds} rounds of {arguments.steps} steps, one thread\n")
    print("| | µs a step, median | lowest | highest | added to the loop by hand |\n|---|---|---|---|---|")
    for name, times in results.items():
        middle = statistics.median(times)
        print(f"| {name} | {middle:.0f} | {min(times):.0f} | {max(times):.0f} | {middle - base:+.0f} |")


if __name__ == "__main__":
    main()
