"""What a run is made of, looked at without running it: the model's parameters and blocks, the optimizer's state.

The model is built without memory, so that one far larger than this machine can be explained on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bigtrain.config.schema import Config
from bigtrain.engines.fsdp import stays_whole
from bigtrain.errors import ModelError
from bigtrain.finetune.adapters import build_model
from bigtrain.finetune.freeze import FreezePlan, plan_freezing
from bigtrain.models.blocks import find_blocks, without_shared_parameters
from bigtrain.optim import Group, OptimizerPlan

# What parameters are kept in; bf16 is computed with, and never kept alone.
_KEPT_IN = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
_BF16_BYTES = 2

# The shape of the tensors on which an optimizer is tried: a prime for each dimension, so that each dimension of a slot
# says which dimension of the parameter it follows.
_TRIED_SHAPE = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Parameter:
    """One parameter; a tied one comes once, as it lies in memory once.

    Attributes:
        name: Its first name in the model.
        shape: Its whole shape.
        itemsize: Bytes of an element as it is kept and updated.
        compute_itemsize: Bytes of an element in forward and backward.
        group: The position of its group in the optimizer's plan; None where it is frozen.
        block: The position of the block with which fsdp gathers it; None where that is the root.
        stays_whole: Whether fsdp leaves it whole on every rank.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    compute_itemsize: int
    group: int | None
    block: int | None
    stays_whole: bool

    @property
    def numel(self) -> int:
        """How many elements the whole of it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """A repeated part of the model that fsdp shards, gathers and gives back on its own.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        num_parameters: Elements of its parameters.
    """

    name: str
    kind: str
    num_parameters: int


@dataclass(frozen=True)
class Parts:
    """A model as memory sees it.

    Attributes:
        parameters: Every one, once.
        blocks: The repeated parts that fsdp takes one by one.
        shared_blocks: Names of repeated parts that fsdp leaves to the root, because they share parameters with others.
        buffer_bytes: Of all buffers, those that are not saved included; whole on every rank under every engine.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    shared_blocks: tuple[str, ...]
    buffer_bytes: int

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def num_trained(self) -> int:
        """Elements of those that are trained."""
        return sum(p.numel for p in self.parameters if p.group is not None)


def build_on_meta(config: Config) -> tuple[nn.Module, FreezePlan]:
    """The plain model in the dtype it is kept in, and its freeze plan; on the meta device if it can be built so.

    It is frozen as in the last phase, in which most of it trains and it needs the most memory. A factory that reads
    values while it builds cannot be built on the meta device: it is built on the host instead.

    Raises:
        ModelError: Where it cannot be built at all.
        PatternError: Where a pattern of `finetune` matches nothing.
    """
    try:
        with torch.device("meta"):
            model = build_model(config)
    except ModelError:
        model = build_model(config)
    freezing = plan_freezing(model, config.finetune)
    freezing.apply(model, freezing.num_phases - 1)
    model.to(dtype=_KEPT_IN[config.precision])
    return model.train(), freezing


def take_apart(model: nn.Module, plan: OptimizerPlan, precision: str) -> Parts:
    """List the parameters and blocks of a plain model."""
    named_blocks = find_blocks(model)
    whole = {p for p in model.parameters() if stays_whole(p)}
    alone = set(without_shared_parameters(model, [block for _, block in named_blocks], whole))
    taken = [(name, block) for name, block in named_blocks if block in alone]
    block_of = {p: position for position, (_, block) in enumerate(taken) for p in block.parameters()}
    group_of = {name: position for position, group in enumerate(plan.groups) for name in group.names}
    parameters = tuple(
        Parameter(
            name,
            tuple(p.shape),
            p.element_size(),
            _BF16_BYTES if precision == "bf16" and p.is_floating_point() else p.element_size(),
            group_of.get(name),
            block_of.get(p),
            stays_whole(p),
        )
        for name, p in model.named_parameters()
    )
    blocks = tuple(
        Block(name, type(block).__name__, sum(p.numel() for p in block.parameters())) for name, block in taken
    )
    shared = tuple(name for name, block in named_blocks if block not in alone)
    return Parts(parameters, blocks, shared, sum(b.nbytes for b in model.buffers()))


@dataclass(frozen=True)
class Slot:
    """A tensor that an optimizer keeps for a parameter.

    Attributes:
        shape: Its shape beside a parameter of the tried shape.
        itemsize: Bytes of an element.
    """

    shape: tuple[int, ...]
    itemsize: int

    def nbytes(self, shape: Sequence[int]) -> int:
        """Its bytes beside a parameter of this shape."""
        tried = _TRIED_SHAPE[: len(shape)]
        if math.prod(self.shape) == math.prod(tried) and self.shape:
            return math.prod(shape) * self.itemsize
        follows = dict(zip(tried, shape, strict=True))
        return math.prod(follows.get(size, size) for size in self.shape) * self.itemsize


class OptimizerSlots:
    """What an optimizer keeps for each parameter, found by one step of the real one on tiny tensors.

    Args:
        plan: The optimizer.
        parts: The parameters it is for.
        precision: The run's, which decides what the parameters are kept in.
        averaged: Whether a moving average of each is kept besides.

    Raises:
        Exception: Whatever an optimizer raises that does not run on the host, or not on tensors so small.
    """

    def __init__(self, plan: OptimizerPlan, parts: Parts, precision: str, *, averaged: bool = False) -> None:
        # One dimension besides the parameters' own: ZeRO flattens them.
        self._keys = {(p.group, ndim) for p in parts.parameters if p.group is not None for ndim in (len(p.shape), 1)}
        tried = {
            f"{group} {ndim}": nn.Parameter(torch.ones(_TRIED_SHAPE[:ndim], dtype=_KEPT_IN[precision]))
            for group, ndim in self._keys
        }
        groups = [
            Group(tuple(f"{group} {ndim}" for group, ndim in sorted(self._keys) if group == position), each.hyper)
            for position, each in enumerate(plan.groups)
        ]
        optimizer = replace(plan, groups=tuple(groups)).build(tried)
        _step(optimizer, tried)
        averages = {(group, ndim): [tried[f"{group} {ndim}"]] if averaged else [] for group, ndim in self._keys}
        self._slots = {
            (group, ndim): [
                Slot(tuple(value.shape), value.element_size())
                for value in (*optimizer.state.get(tried[f"{group} {ndim}"], {}).values(), *averages[group, ndim])
                if isinstance(value, Tensor)
            ]
            for group, ndim in self._keys
        }

    def nbytes(self, group: int, shape: Sequence[int]) -> int:
        """Bytes of the state of a tensor of this shape in the group at that position."""
        return sum(slot.nbytes(shape) for slot in self._slots[group, len(shape)])


def _step(optimizer: torch.optim.Optimizer, tensors: Mapping[str, nn.Parameter]) -> None:
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
