"""A run whose evaluations are written down beforehand: after k steps its weight is k, and its score the k-th number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.protocols import Batch, LossSum

STEPS = 12


class Counter(nn.Module):
    """A weight that SGD at a rate of 1 raises by 1 in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Numbers:
    """Samples that are all 1."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(1)


def numbers(split: str) -> Numbers:
    return Numbers()


class Scripted:
    """The score of an evaluation after k steps is the k-th number, or another on ranks but the first."""

    def __init__(self, *, scores: list[float], others: list[float] | None = None) -> None:
        self._scores = others if others and os.environ.get("RANK", "0") != "0" else scores

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        outputs = model(batch.data)
        return LossSum(-(outputs[:, 0] * batch.weight).sum(), batch.weight.sum(), preds=outputs)

    def metrics(self) -> Score:
        return Score(self._scores)


class Score:
    def __init__(self, scores: list[float]) -> None:
        self._scores, self._step = scores, 0

    def to(self, device: torch.device) -> None: ...

    def update(self, result: LossSum, batch: Batch) -> None:
        assert result.preds is not None
        self._step = round(float(result.preds[0, 0]))

    def compute(self) -> dict[str, Any]:
        return {"score": float(self._scores[self._step]), "matrix": torch.zeros(2, 2)}


def config(folder: Path, scores: list[float], **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "run": {"name": "run", "dir": str(folder / "runs")},
        "task": {"name": "tests.helpers.scripted:Scripted", "args": {"scores": scores}},
        "model": "tests.helpers.scripted:Counter",
        "data": {
            "name": "tests.helpers.scripted:numbers",
            "batch_size": 8,
            "eval": {"name": "tests.helpers.scripted:numbers"},
        },
        "train": {"steps": STEPS},
        "optim": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip_grad_norm": None},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none"},
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return made
