"""A table for classification: rows standardised by the training rows alone, and a small perceptron."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

HELD_OUT_EVERY = 5


class Table:
    """Rows and labels in memory: float32 (rows, columns), int64 (rows,)."""

    is_random = False

    def __init__(self, rows: Tensor, labels: Tensor, class_names: list[str]) -> None:
        self.rows, self.labels = rows, labels
        self.class_names, self.num_classes = class_names, len(class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.rows[indices], self.labels[indices]


def breast_cancer(split: str) -> Table:
    """Every fifth row is for evaluation, in the order of the table; what scales them is taken from the others."""
    found = load_breast_cancer()
    rows = torch.tensor(found.data, dtype=torch.float64)
    labels = torch.tensor(found.target, dtype=torch.int64)
    is_held_out = torch.arange(len(rows)) % HELD_OUT_EVERY == 0
    seen = rows[~is_held_out]
    scaled = ((rows - seen.mean(0)) / seen.std(0)).float()
    chosen = is_held_out if split == "eval" else ~is_held_out
    return Table(scaled[chosen], labels[chosen], [str(name) for name in found.target_names])


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self, *, inputs: int, width: int, dropout: float = 0.0, num_classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, width), nn.SiLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout)),
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, rows: Tensor) -> Tensor:  # (rows, columns) -> (rows, classes)
        out: Tensor = self.head(self.layers(rows))
        return out
