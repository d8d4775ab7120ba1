"""From a way to make a model to a module that an engine can take: built, frozen, cast, with initial values.

Initial values do not depend on the engine or the number of processes: a model that answers `init_tensor` is built
without memory and filled piece by piece; any other is built on the host under one seed, whole on every rank, and cut
up afterwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from bigtrain.errors import CombinationError
from bigtrain.models.blocks import batchnorm_over_batch, find_blocks
from bigtrain.state import BUFFER, WEIGHT, Piece, whole

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

# Elements filled under one seed. It is part of the definition of every initial value: changing it changes them.
_FILL_CHUNK = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A module ready for an engine.

    Attributes:
        model: The plain module; on the meta device if `fill` is to give it values.
        blocks: Its repeated parts, for sharding.
        fill: Gives initial values to pieces, or None where the module has them already.
    """

    model: nn.Module
    blocks: list[nn.Module]
    fill: Callable[[Sequence[Piece]], None] | None


def prepare(
    make: Callable[[], nn.Module],
    *,
    fillable: bool,
    freeze: Callable[[nn.Module], None],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    num_processes: int,
    shards: bool,
) -> Prepared:
    """Build a model and make it ready for an engine, in this order.

    1. Build: a fillable model that will be sharded on the meta device, any other on the host under the seed.
    2. Freeze: what is trained decides which parameters get gradients and optimizer state.
    3. Convert to the dtype of the run, before an engine wraps: DDP and FSDP2 take parameters as they find them.
    4. Give values and move, unless the engine shards the model: then each rank fills only what it holds.

    Args:
        make: Builds the plain model.
        fillable: Whether the model answers `init_tensor`.
        freeze: Freezes what is not to be trained.
        seed: Decides every initial value.
        device: Where the model will compute.
        dtype: Of parameters and buffers.
        num_processes: How many will train together.
        shards: Whether the engine cuts the model up itself.

    Raises:
        CombinationError: Where the model would compute something else on several processes than on one.
    """
    seed_everything(seed)
    with torch.device("meta" if fillable and shards else "cpu"):
        model = make()
    freeze(model)
    refuse_local_batchnorm(model, num_processes)
    model.to(dtype=dtype)
    model.train()
    if not shards:
        if fillable:
            fill_pieces(model, _whole_pieces(model), seed)
        model.to(device)
    blocks = [block for _, block in find_blocks(model)]
    fill = (lambda pieces: fill_pieces(model, pieces, seed)) if fillable and shards else None
    return Prepared(model, blocks, fill)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def refuse_local_batchnorm(model: nn.Module, num_processes: int) -> None:
    """Refuse BatchNorm over a rank's own part of the batch: the numbers would depend on the number of processes.

    Raises:
        CombinationError: Naming the modules and the ways out.
    """
    names = batchnorm_over_batch(model)
    if num_processes == 1 or not names:
        return
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    raise CombinationError(
        f"BatchNorm over {num_processes} processes would normalise each rank's part of the batch on its own: {shown}",
        where="model",
        remedy="use group norm (torchvision models: model.args.norm_layer=group_norm), freeze it (finetune.freeze),\n"
        "convert it in your factory with torch.nn.SyncBatchNorm.convert_sync_batchnorm (on GPUs),\n"
        "or train in one process",
    )


def fill_pieces(model: nn.Module, pieces: Sequence[Piece], seed: int) -> None:
    """Give pieces of parameters and persistent buffers their initial values, and compute the other buffers anew.

    Every run of `_FILL_CHUNK` elements of the full, row-major tensor is drawn under a seed made of (seed, name,
    number of the run), in float32, so that any cut gives the same values. Memory is bounded by the piece's rows.
    """
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            for piece in pieces:
                piece.data.copy_(_initial_values(model, piece, seed))
    finally:
        torch.set_rng_state(state)
    if hasattr(model, "reset_buffers"):
        model.reset_buffers()  # type: ignore[operator]


def _initial_values(model: nn.Module, piece: Piece, seed: int) -> Tensor:
    """The initial values of one piece: its rows are drawn whole, then cut to the box."""
    row = math.prod(piece.shape[1:])
    first, rows = (piece.box.offset[0], piece.box.size[0]) if piece.shape else (0, 1)
    begin, end = first * row, (first + rows) * row
    chunks = range(begin // _FILL_CHUNK, -(-end // _FILL_CHUNK))
    total = math.prod(piece.shape)
    flat = [_initial_chunk(model, piece, seed, chunk, total) for chunk in chunks]
    values = torch.cat(flat) if flat else torch.empty(0)
    start = begin - chunks.start * _FILL_CHUNK
    values = values[start : start + end - begin].reshape(piece.data.shape[:1] + piece.shape[1:])
    return values[(slice(None), *piece.box.slices[1:])] if piece.shape else values.reshape(())


def _initial_chunk(model: nn.Module, piece: Piece, seed: int, chunk: int, total: int) -> Tensor:
    values = torch.empty(min(_FILL_CHUNK, total - chunk * _FILL_CHUNK))
    # Not torch.manual_seed, which would seed the devices' generators as well.
    torch.default_generator.manual_seed(xxhash.xxh64_intdigest(f"{seed}/{piece.name}/{chunk}".encode()) >> 1)
    model.init_tensor(piece.name, values)  # type: ignore[operator]
    return values


def _whole_pieces(model: nn.Module) -> list[Piece]:
    persistent = model.state_dict(keep_vars=True)
    named: dict[str, dict[str, Tensor]] = {
        WEIGHT: dict(model.named_parameters()),
        BUFFER: dict(model.named_buffers()),
    }
    return [
        Piece(name, kind, tuple(t.shape), t.dtype, whole(t.shape), t.detach(), True)
        for kind, tensors in named.items()
        for name, t in tensors.items()
        if name in persistent
    ]
