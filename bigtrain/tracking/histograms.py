"""Histograms of weights that are cut up over ranks: every rank counts its own pieces, and the counts are added up.

The edges are the same for all tensors and steps, so counts add up exactly: powers of a tenth part of a decade, on both
sides of zero, as TensorBoard's own default edges are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bigtrain.dist import World
from bigtrain.state import WEIGHT, Piece

_DECADES, _PARTS = (-10, 4), 10


def edges() -> Tensor:
    """The edges of all bins, rising; what lies outside is counted in the outermost."""
    low, high = _DECADES
    positive = torch.logspace(low, high, (high - low) * _PARTS + 1, dtype=torch.float64)
    return torch.cat((-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive))


def histograms(pieces: Iterable[Piece], world: World) -> dict[str, dict[str, Any]]:
    """Histograms of every weight by name, over all ranks. Every rank must call it.

    Returns:
        For each weight its `edges`, `counts`, `min`, `max`, `sum` and `sum_squares`.
    """
    bins = edges()
    mine = [piece for piece in pieces if piece.kind == WEIGHT]
    names = sorted({piece.name for piece in mine})
    if world.size > 1:
        names = sorted(set().union(*world.all_gather_object(names)))
    counts = torch.zeros(len(names), len(bins) + 1, dtype=torch.int64)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    extremes = torch.full((len(names), 2), -torch.inf, dtype=torch.float64)  # of the negative minimum, the maximum
    place = {name: number for number, name in enumerate(names)}
    for piece in mine:
        if piece.is_owner and piece.data.numel():
            number, values = place[piece.name], piece.data.detach().double().flatten()
            where = torch.bucketize(values, bins.to(values.device), right=True)
            counts[number] += torch.bincount(where, minlength=len(bins) + 1).cpu()
            sums[number] += torch.stack((values.sum(), values.square().sum())).cpu()
            extremes[number] = torch.maximum(extremes[number], torch.stack((-values.min(), values.max())).cpu())
    _over_ranks(world, counts, sums, extremes)
    return {
        name: _trimmed(bins, counts[number], sums[number], extremes[number])
        for number, name in enumerate(names)
        if counts[number].sum()
    }


def _over_ranks(world: World, counts: Tensor, sums: Tensor, extremes: Tensor) -> None:
    if world.size > 1:
        import torch.distributed as dist

        for tensor, operation in (
            (counts, dist.ReduceOp.SUM),
            (sums, dist.ReduceOp.SUM),
            (extremes, dist.ReduceOp.MAX),
        ):
            dist.all_reduce(tensor, op=operation, group=world.group)


def _trimmed(bins: Tensor, counts: Tensor, sums: Tensor, extremes: Tensor) -> dict[str, Any]:
    """Without the empty bins at both ends."""
    inner = counts[1:-1].clone()
    inner[0] += counts[0]
    inner[-1] += counts[-1]
    held = inner.nonzero().flatten()
    first, last = int(held[0]), int(held[-1])
    return {
        "edges": bins[first : last + 2].tolist(),
        "counts": inner[first : last + 1].tolist(),
        "min": -float(extremes[0]),
        "max": float(extremes[1]),
        "sum": float(sums[0]),
        "sum_squares": float(sums[1]),
    }
