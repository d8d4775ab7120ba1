"""From a way to make a model to a module that an engine can take: built, frozen, cast, with initial values.

Initial values do not depend on the engine or the number of processes: a model that answers `init_tensor` is built
without memory and filled piece by piece; any other is built on the host under one seed, whole on every rank, and cut
up afterwards.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bigtrain.errors import CombinationError, ModelError, SetupError
from bigtrain.models.blocks import batchnorm_over_batch, find_blocks
from bigtrain.state import BUFFER, WEIGHT, Piece, whole

# What parameters, buffers and inputs are kept in, and what forward and backward compute in where that is another.
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
COMPUTE_DTYPES = {"bf16": torch.bfloat16}

_aten = torch.ops.aten
# What selective activation checkpointing keeps: results that cost much more to compute again than to hold.
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

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
    recompute: str | int = "none",
) -> Prepared:
    """Build a model and make it ready for an engine, in this order.

    1. Build: a fillable model that will be sharded on the meta device, any other on the host under the seed.
    2. Freeze: what is trained decides which parameters get gradients and optimizer state.
    3. Convert to the dtype of the run, before an engine wraps: DDP and FSDP2 take parameters as they find them.
    4. Give values and move, unless the engine shards the model: then each rank fills only what it holds.
    5. Checkpoint activations inside the blocks, before an engine shards them: a block's parameters are gathered around
       its whole forward, and again around its whole backward, which the recomputation is a part of.

    Args:
        make: Builds the plain model.
        fillable: Whether the model answers `init_tensor`.
        freeze: Freezes what is not to be trained.
        seed: Decides every initial value.
        device: Where the model will compute.
        dtype: Of parameters and buffers.
        num_processes: How many will train together.
        shards: Whether the engine cuts the model up itself.
        recompute: Which activations are computed again in the backward pass: none, full, ops, or those of one block
            in so many.

    Raises:
        CombinationError: Where the model would compute something else on several processes than on one, or has no
            blocks to recompute.
    """
    seed_everything(seed)
    with torch.device("meta" if fillable and shards else "cpu"):
        model = make()
    _refuse_lazy(model)
    freeze(model)
    refuse_local_batchnorm(model, num_processes)
    model.to(dtype=dtype)
    model.train()
    if not shards:
        if fillable:
            fill_pieces(model, _whole_pieces(model), seed)
        model.to(device)
    blocks = [block for _, block in find_blocks(model)]
    checkpoint_activations(blocks, recompute)
    fill = (lambda pieces: fill_pieces(model, pieces, seed)) if fillable and shards else None
    return Prepared(model, blocks, fill)


def _refuse_lazy(model: nn.Module) -> None:
    """Refuse parameters whose shapes only a first batch would tell.

    Raises:
        ModelError: Naming the modules.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = [name.rpartition(".")[0] for name, tensor in tensors if is_lazy(tensor)]
    if names:
        raise ModelError(
            f"the model has lazy modules, whose shapes are not known yet: {', '.join(dict.fromkeys(names))}",
            where="model",
            remedy="call it once with a batch of zeros in the factory that makes it, or give the sizes",
        )


def checkpoint_activations(blocks: Sequence[nn.Module], recompute: str | int) -> None:
    """Let blocks keep their inputs only, and compute the rest again in backward (Chen et al., arXiv:1604.06174).

    Each block's `forward` is wrapped, not the block: parameter names stay. Random numbers are drawn again as they were,
    so the gradients are the same to the last bit.

    Args:
        blocks: The model's repeated parts.
        recompute: none; full, all of every block; ops, all but the results of matrix products, convolutions and
            attention; or n, all of every n-th block.

    Raises:
        CombinationError: Where there are no blocks.
    """
    if recompute == "none":
        return
    if not blocks:
        raise CombinationError(
            "the model has no repeated blocks whose activations could be computed again",
            where="activation_checkpointing",
            remedy="set it to none, or let the model answer blocks()",
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute == "ops":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    for block in blocks[:: recompute if isinstance(recompute, int) else 1]:
        block.forward = partial(checkpoint, block.forward, **settings)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile and DeepSpeed's Adam for the host need."""
    return any(shutil.which(name) for name in ("g++", "c++"))


def compile_forward(modules: Sequence[nn.Module], *, fullgraph: bool) -> None:
    """Let torch.compile have the forward of each module, for shapes that never change.

    It comes after activation checkpointing, which it then sees through, and before an engine's hooks, which it
    leaves outside. Blocks of one class share one graph. Nothing is compiled before the first call.

    Args:
        modules: The blocks, or the whole model.
        fullgraph: Whether an untraceable part is an error.

    Raises:
        SetupError: Where there is no C++ compiler, which torch.compile needs on a CPU and beside a GPU.
        CombinationError: Where there is nothing to compile.
    """
    if not modules:
        raise CombinationError(
            "the model has no repeated blocks to compile",
            where="compile",
            remedy="set compile=model, or let the model answer blocks()",
        )
    if not has_compiler():
        raise SetupError(
            "torch.compile needs a C++ compiler, and there is none",
            where="compile",
            remedy="install one (apt install g++), or set compile=none",
        )
    import torch._dynamo  # half a second, for those who compile

    # Blocks of one class that differ in their sizes need graphs of their own, each in training and in evaluation.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(modules))
    for module in modules:
        module.forward = torch.compile(module.forward, fullgraph=fullgraph, dynamic=False)


def _keep_expensive(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


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
        remedy="use group norm (torchvision models: model.args.norm_layer=group_norm), freeze it (finetune.freeze, or\n"
        "finetune.freeze_batchnorm, which keeps it so),\n"
        "convert it in your factory with torch.nn.SyncBatchNorm.convert_sync_batchnorm (on GPUs),\n"
        "or train in one process",
    )


def fill_pieces(model: nn.Module, pieces: Sequence[Piece], seed: int) -> None:
    """Give pieces of parameters and persistent buffers their initial values, and compute the other buffers anew.

    Every run of `_FILL_CHUNK` elements of the full, row-major tensor is drawn under a seed made of (seed, name,
    number of the run), in float32, so that any cut gives the same values.
    """
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            for piece in pieces:
                _fill(model, piece, seed)
    finally:
        torch.set_rng_state(state)
    if hasattr(model, "reset_buffers"):
        model.reset_buffers()  # type: ignore[operator]


def _fill(model: nn.Module, piece: Piece, seed: int) -> None:
    """Give one piece its initial values, some rows at a time, so that little memory is needed beside it."""
    row = math.prod(piece.shape[1:])
    first, rows = (piece.box.offset[0], piece.box.size[0]) if piece.shape else (0, 1)
    total, at_once = math.prod(piece.shape), max(1, _FILL_CHUNK // max(1, row))
    drawn: dict[int, Tensor] = {}
    for start in range(0, rows, at_once):
        stop = min(rows, start + at_once)
        begin, end = (first + start) * row, (first + stop) * row
        chunks = range(begin // _FILL_CHUNK, -(-end // _FILL_CHUNK))
        # Rows drawn before may have ended in the middle of one.
        drawn = {n: drawn[n] if n in drawn else _initial_chunk(model, piece, seed, n, total) for n in chunks}
        flat = torch.cat([*drawn.values()]) if drawn else torch.empty(0)
        skipped = begin - chunks.start * _FILL_CHUNK
        values = flat[skipped : skipped + end - begin].reshape(stop - start, *piece.shape[1:])
        if piece.shape:
            piece.data[start:stop].copy_(values[(slice(None), *piece.box.slices[1:])])
        else:
            piece.data.copy_(values.reshape(()))


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
