"""The trainings that benchmarks/gpu.py compares: one model, its loss and its data, trained by four programs.

Each makes as many steps with fused AdamW in two groups (norms are not decayed) and gradients clipped at 1, and logs
every ten steps, except by hand. The clock is in the model.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bigtrain
from bigtrain.models.gpt import GPT

LR, DECAY, CLIP = 1e-4, 0.01, 1.0


@dataclass(frozen=True)
class Setting:
    """What all of them train.

    Attributes:
        device: Where.
        args: The gpt's.
        batch: Sequences a step.
        settling: Steps that are not counted.
        steps: Steps that are.
    """

    device: torch.device
    args: Mapping[str, Any]
    batch: int
    settling: int
    steps: int


Train = Callable[["Timed", "Tokens", Setting, Path], None]


def gpt_on(device: torch.device, args: Mapping[str, Any]) -> GPT:
    """A gpt made where it trains: drawing billions of numbers on the host would take minutes."""
    torch.manual_seed(0)
    with device:
        return GPT(**args)


class Tokens(torch.utils.data.Dataset[Any]):
    """Random tokens in memory."""

    def __init__(self, number: int, context: int, vocab: int) -> None:
        self.tokens = torch.randint(vocab, (number, context + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"tokens": self.tokens[torch.tensor(indices)]}


class Timed(nn.Module):
    """A gpt that looks at the clock when it has settled, and in its last step; both times when the device is done."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.net = gpt_on(setting.device, setting.args)
        self.begins, self.ends = setting.settling, setting.settling + setting.steps
        self.calls = 0
        self.times: list[float] = []

    def forward(self, tokens: Tensor, sum_cross_entropy_of: Tensor | None = None) -> Tensor:
        """Logits, or the sum of the cross-entropies."""
        if self.training and torch.is_grad_enabled():
            if self.calls in (self.begins, self.ends):
                if tokens.is_cuda:
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
            self.calls += 1
        return self.net(tokens, sum_cross_entropy_of=sum_cross_entropy_of)

    def mean_loss(self, tokens: Tensor) -> Tensor:
        """Of a batch (B, T + 1)."""
        return self(tokens[:, :-1], sum_cross_entropy_of=tokens[:, 1:]) / tokens[:, 1:].numel()


def seconds_a_step(train: Train, setting: Setting) -> float:
    """The mean time of a step."""
    model = Timed(setting)
    data = Tokens(64 * setting.batch, setting.args["context"], setting.args["vocab"])
    # Some print what they log.
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(model, data, setting, Path(folder))
    began, ended = model.times
    return (ended - began) / setting.steps


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def _loader(data: Tokens, setting: Setting) -> Any:
    pinned = setting.device.type == "cuda"
    return torch.utils.data.DataLoader(
        data, setting.batch, shuffle=True, collate_fn=lambda batch: batch, pin_memory=pinned
    )


def by_hand(model: Timed, data: Tokens, setting: Setting, folder: Path) -> None:
    optimizer, step = torch.optim.AdamW(_groups(model), lr=LR, fused=True), 0
    while True:
        for batch in _loader(data, setting):
            if step > model.ends:
                return
            with torch.autocast(setting.device.type, torch.bfloat16):
                loss = model.mean_loss(batch["tokens"].to(setting.device, non_blocking=True))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def with_bigtrain(model: Timed, data: Tokens, setting: Setting, folder: Path) -> None:
    run = {
        "run": {"dir": str(folder), "name": "bigtrain"},
        "task": "causal_lm",
        "data": {"batch_size": setting.batch, "eval": "none"},
        "train": {"steps": model.ends + 1},
        "optim": {"lr": LR, "clip_grad_norm": CLIP},
        "precision": "bf16",
        "engine": {"name": "single", "device": setting.device.type},
        "track": {"progress": "none"},
    }
    bigtrain.train(run, model=model, data=data)


def with_lightning(model: Timed, data: Tokens, setting: Setting, folder: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.model.mean_loss(batch["tokens"])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(_groups(self.model), lr=LR, fused=True)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # Lightning clips with fused optimizers only by hand.
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)

    trainer = lightning.Trainer(
        max_steps=model.ends + 1, accelerator=setting.device.type, devices=1, precision="bf16-mixed",
        log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        logger=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), _loader(data, setting))


def with_transformers(model: Timed, data: Tokens, setting: Setting, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"loss": self.model.mean_loss(tokens)}

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=model.ends + 1, per_device_train_batch_size=setting.batch,
        learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP, logging_steps=10, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=setting.device.type == "cpu", bf16=True, optim="adamw_torch_fused",
        remove_unused_columns=False,
    )  # fmt: skip
    Trainer(Wrapped(), arguments, train_dataset=data, data_collator=_collated).train()


def _collated(samples: Any) -> Any:
    return samples if isinstance(samples, dict) else {"tokens": torch.stack([s["tokens"] for s in samples])}


PEERS = {
    "by hand": (by_hand, ["torch"]),
    "bigtrain": (with_bigtrain, ["torch"]),
    "Lightning": (with_lightning, ["lightning"]),
    "transformers' Trainer": (with_transformers, ["transformers", "accelerate"]),
}
