"""The training state in terms that know no engine: named pieces of named tensors.

An engine lists views of the memory it holds (`Piece`), a reader fills such views from anywhere. Engines, checkpoints
and tests share this vocabulary, and it knows none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bigtrain.errors import StateError

WEIGHT = "weight"
BUFFER = "buffer"
EMA = "ema"


class Box(NamedTuple):
    """An axis-aligned part of a tensor: where it starts and how far it reaches, in elements, by dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indexes the full tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


def whole(shape: Iterable[int]) -> Box:
    """The box that is the whole tensor."""
    size = tuple(shape)
    return Box((0,) * len(size), size)


def boxes_of_slice(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Cut a slice of a flattened, row-major tensor into boxes, in order.

    The rest of the first row, the whole rows between, the start of the last one; and so on inward.

    Args:
        shape: The tensor's shape.
        start: The slice's first element.
        stop: The one after its last.

    Yields:
        Each box, and the position of its first element in the flattened tensor.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        rest = shape[1:]
        yield Box((first, *(0 for _ in rest)), (last - first, *rest)), first * row
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    before = index * math.prod(shape[1:])
    for box, position in boxes_of_slice(shape[1:], start - before, stop - before):
        yield Box((index, *box.offset), (1, *box.size)), before + position


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one tensor as one rank holds it.

    Attributes:
        name: The parameter's or buffer's name in the plain model.
        kind: "weight", "buffer", "ema", or an optimizer slot ("exp_avg", "step", …) of the parameter `name`.
        shape: The shape of the full tensor.
        dtype: Its dtype in the state (master weights, not what the forward pass sees).
        box: Which part this is.
        data: A view of the memory itself, of the box's size: writing to it writes the state.
        is_owner: Whether this rank stands for the piece among the ranks that hold the same.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    data: Tensor
    is_owner: bool

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the full tensor."""
        return (self.kind, self.name)


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one rank holds of the training state.

    Attributes:
        pieces: This rank's pieces.
        hyper: Every optimizer hyperparameter of every trainable parameter, by parameter name; the same on all ranks.
            `lr` is the
            parameter's own rate, before the schedule's factor.
    """

    pieces: list[Piece]
    hyper: dict[str, dict[str, Any]]


class TensorSpec(NamedTuple):
    """A full tensor of the state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader(Protocol):
    """Where a state is read from."""

    @property
    def hyper(self) -> Mapping[str, Mapping[str, Any]]:
        """Every hyperparameter by parameter name."""

    @property
    def index(self) -> Mapping[tuple[str, str], TensorSpec]:
        """What there is to read, by kind and name."""

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` (the box's size) with that part of the tensor."""


class MemoryReader:
    """Reads from full tensors in memory."""

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor], hyper: Mapping[str, Mapping[str, Any]]) -> None:
        self.tensors = dict(tensors)
        self.hyper = hyper
        self.index = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self.tensors.items()}

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor."""
        with torch.no_grad():
            out.copy_(self.tensors[kind, name][box.slices])


def assemble(states: Iterable[EngineState]) -> MemoryReader:
    """Put the pieces of all ranks together into full tensors.

    Raises:
        StateError: Where owners leave a hole or overlap, or ranks disagree on a tensor's shape or dtype.
    """
    tensors: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], Tensor] = {}  # which elements are there
    wrong: set[tuple[str, str]] = set()
    hyper: dict[str, dict[str, Any]] = {}
    for state in states:
        hyper = hyper or state.hyper
        for piece in state.pieces:
            full = tensors.setdefault(piece.key, torch.empty(piece.shape, dtype=piece.dtype))
            there = filled.setdefault(piece.key, torch.zeros(piece.shape, dtype=torch.bool))
            if (tuple(full.shape), full.dtype) != (piece.shape, piece.dtype):
                ours, theirs = f"{piece.shape} {piece.dtype}", f"{tuple(full.shape)} {full.dtype}"
                raise StateError(f"{piece.kind} {piece.name} is {ours} on one rank, {theirs} on another")
            if piece.is_owner:
                if there[piece.box.slices].any():
                    wrong.add(piece.key)
                full[piece.box.slices] = piece.data.detach().to("cpu")
                there[piece.box.slices] = True
    wrong |= {key for key, there in filled.items() if not there.all()}
    if wrong:
        names = ", ".join(sorted(f"{kind} {name}" for kind, name in wrong))
        raise StateError(f"pieces do not cover each tensor exactly once: {names}")
    return MemoryReader(tensors, hyper)
