"""Moving averages of weights beside an engine, whichever it is: what it holds of a weight, it holds of its average.

An average is a piece of the state like a moment: in checkpoints by name, read under any engine and number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.engines.base import Engine
from bigtrain.engines.sums import StepResult
from bigtrain.protocols import LossSum
from bigtrain.state import BUFFER, EMA, WEIGHT, EngineState, Piece, Reader


class _Pair(NamedTuple):
    """A piece that is averaged, and its average."""

    piece: Piece
    average: Tensor


class Averaged:
    """An engine, and the averages of the weights that it trains and of the floating buffers that move.

    After the k-th step of the run an average moves by 1 - min(decay, (1 + k) / (10 + k)) of its distance from the
    weight: a long memory, which is shorter in the beginning, so that initial values are soon forgotten (the formula is
    that of TensorFlow's ExponentialMovingAverage). It is a pure function of the step, so there is no counter to save.
    What is frozen is its own average and has none here.

    Args:
        engine: What trains.
        names: The parameters that train, and the buffers that are not frozen.
        decay: The share that an average keeps of itself in a step.
        evaluates: Whether evaluations see the averages instead of the weights.
    """

    def __init__(self, engine: Engine, names: Collection[str], decay: float, *, evaluates: bool) -> None:
        self._engine, self._names, self._decay, self._evaluates = engine, frozenset(names), decay, evaluates
        self.name, self.model = engine.name, engine.model
        self._averages = [piece.data.clone() for piece in self._averaged_pieces()]
        self._known: list[Tensor] | None = None

    def _averaged_pieces(self) -> list[Piece]:
        """What is averaged, where it lies now: always the same pieces, in the same order."""
        return [
            piece
            for piece in self._engine.state().pieces
            if piece.kind in (WEIGHT, BUFFER) and piece.name in self._names and piece.dtype.is_floating_point
        ]

    def _pairs(self) -> list[_Pair]:
        return [_Pair(*pair) for pair in zip(self._averaged_pieces(), self._averages, strict=True)]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | bool) -> None:
        """Let the averages follow, after a step.

        Args:
            step: How many steps have been taken, this one included.
            skipped: Whether this one was left out; nothing moves then. On a device, nobody waits for it.
        """
        if self._known is None:  # they lie elsewhere after the first forward pass under fsdp
            self._known = [piece.data for piece in self._averaged_pieces()]
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        if isinstance(skipped, bool):
            if not skipped:
                torch._foreach_lerp_(self._averages, self._known, share)
            return
        moved = torch.where(skipped, 0.0, share)
        for average, weight in zip(self._averages, self._known, strict=True):
            average.lerp_(weight, moved.to(average.device, average.dtype))

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange weights and averages where they lie. Every rank must call it."""
        for piece, average in self._pairs():
            kept = piece.data.clone()
            piece.data.copy_(average)
            average.copy_(kept)
        self._engine.follow()
        self._known = None

    # ---- the contract ----------

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one microbatch."""
        return self._engine.microbatch(last=last)

    def backward(self, result: LossSum) -> None:
        """Add the gradient of this microbatch's sum of losses, and the sum itself, to the step's."""
        self._engine.backward(result)

    def step(self, lr_scale: float) -> StepResult:
        """Divide by the targets of the whole global batch, clip, update, zero."""
        return self._engine.step(lr_scale)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with the averages where they are wanted."""
        if not self._evaluates:
            with self._engine.evaluating():
                yield
            return
        self._swap()
        try:
            with self._engine.evaluating():
                yield
        finally:
            self._swap()

    def state(self) -> EngineState:
        """Views of this rank's pieces."""
        state = self._engine.state()
        averages = [
            Piece(piece.name, EMA, piece.shape, piece.dtype, piece.box, average, piece.is_owner)
            for piece, average in self._pairs()
        ]
        return EngineState([*state.pieces, *averages], state.hyper)

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Fill the pieces in place; an average that the reader has not begins at its weight."""
        self._engine.load(reader)
        for piece, average in self._pairs():
            if (EMA, piece.name) in reader.index:
                reader.read_into(EMA, piece.name, piece.box, average)
            else:
                average.copy_(piece.data)
        self._known = None

    def follow(self) -> None:
        """Let what is computed with follow the pieces, whose memory has been written to."""
        self._engine.follow()

    def close(self) -> None:
        """Let go of everything."""
        self._engine.close()
        self._averages.clear()
        self._known = None
        del self._engine, self.model
