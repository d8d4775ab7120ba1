"""A small convolutional network with BatchNorm, and a run file that fine-tunes it from the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.bn(self.conv(x)).relu()
        return out


class Net(nn.Module):
    """Three blocks over 8×8 images."""

    def __init__(self, *, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 7, 3, padding=1)
        self.layers = nn.ModuleList(Block(7) for _ in range(3))
        self.head = nn.Linear(7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def config(folder: Path, name: str, classes: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 1},
        "task": "classification",
        "model": {"name": "tests.helpers.transfer:Net", "args": {"num_classes": len(classes)}},
        "data": {"name": "digits", "args": {"classes": classes}, "batch_size": 128, "eval": {"split": 0.2}},
        "train": {"epochs": 4, "micro_batch_size": 32},
        "optim": {"lr": 0.01, "weight_decay": 0.01},
        "engine": {"device": "cpu"},
        "checkpoint": {"every_steps": 4},
        "track": {"log_every": 1, "progress": "none"},
        **changes,
    }


FINETUNE = {
    "freeze": ["stem.*", "layers.*"],
    "freeze_batchnorm": True,
    "unfreeze": [{"at_epoch": 2, "match": "layers.2.*", "lr_scale": 0.3}],
}
