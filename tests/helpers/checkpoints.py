"""States cut as engines cut them, and several ranks in one process that write them."""

from __future__ import annotations

import itertools
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint import CheckpointReader, Ranks, open_checkpoint, save
from bigtrain.checkpoint.files import Files
from bigtrain.dist import World
from bigtrain.state import Box, EngineState, Piece, boxes_of_slice, whole

Tensors = Mapping[tuple[str, str], Tensor]
LAYOUTS = ("replicated", "rows", "flat", "group", "columns", "pairs")

HYPER = {"w": {"lr": 1e-3, "betas": (0.9, 0.999), "decay": float("inf"), "amsgrad": False}}
EXTRA = {"samples": 12345678901234567890, "fingerprint": "é", "position": [1, 2], "none": None}


class ThreadRanks(Ranks):
    """One of several ranks, each a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, values: list[Any]) -> None:
        super().__init__(World(rank, size))
        self._meeting, self._values = meeting, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._meeting.wait(30)
        values = list(self._values)
        self._meeting.wait(30)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """Call a function as every rank of a world of threads: what each returned or raised."""
    meeting, values = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(rank, size, meeting, values))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    return results


def runs(layout: str, tensors: Tensors, size: int) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """The elements of each tensor that each rank holds."""
    if layout == "group":  # stages 1 and 2 of ZeRO: everything end to end, cut into equal slices
        every, begin, cuts = -(-sum(t.numel() for t in tensors.values()) // size), 0, {}
        for key, tensor in tensors.items():
            borders = [min(max(r * every - begin, 0), tensor.numel()) for r in range(size + 1)]
            cuts[key] = list(itertools.pairwise(borders))
            begin += tensor.numel()
        return cuts
    found = {}
    for key, tensor in tensors.items():
        rows = tensor.shape[0] if tensor.ndim else 1
        unit = 1 if layout == "flat" else tensor.numel() // max(rows, 1)
        every = -(-(tensor.numel() if layout == "flat" else rows) // size) * unit
        found[key] = [(min(r * every, tensor.numel()), min((r + 1) * every, tensor.numel())) for r in range(size)]
    return found


def cut(layout: str, tensors: Tensors, size: int) -> list[EngineState]:
    """The state of every rank; views of the tensors where they are one."""
    states = [EngineState([], HYPER) for _ in range(size)]
    shared = runs("rows" if layout in ("columns", "pairs", "replicated") else layout, tensors, size)
    for position, (key, tensor) in enumerate(tensors.items()):
        for rank, state in enumerate(states):
            if layout == "replicated" or not tensor.ndim or not tensor.numel():
                state.pieces.append(_piece(key, tensor, whole(tensor.shape), position % size == rank))
            elif layout == "columns":
                every = -(-tensor.shape[-1] // size)
                start, stop = (min(n * every, tensor.shape[-1]) for n in (rank, rank + 1))
                offset = (*(0 for _ in tensor.shape[1:]), start)
                state.pieces.append(_piece(key, tensor, Box(offset, (*tensor.shape[:-1], stop - start)), True))
            elif layout == "pairs" and size % 2 == 0:  # as under HSDP: two copies of everything
                half = runs("rows", tensors, size // 2)[key][rank % (size // 2)]
                owner = position % 2 == rank // (size // 2)
                state.pieces.extend(
                    _piece(key, tensor, box, owner) for box, _ in boxes_of_slice(tuple(tensor.shape), *half)
                )
            else:
                mine = boxes_of_slice(tuple(tensor.shape), *shared[key][rank])
                state.pieces.extend(_piece(key, tensor, box, True) for box, _ in mine)
    return states


def _piece(key: tuple[str, str], tensor: Tensor, box: Box, is_owner: bool) -> Piece:
    return Piece(key[1], key[0], tuple(tensor.shape), tensor.dtype, box, tensor[box.slices], is_owner)


def save_all(
    folder: Path, step: int, states: list[EngineState], *, files: Files | None = None, **options: Any
) -> list[Any]:
    """Save as several ranks: the path, or the error, on each."""
    if files:
        options["files"] = files

    def one(ranks: Ranks) -> Path:
        return save(ranks, folder, step, states[ranks.rank], extra=EXTRA, own={"rng": bytes([ranks.rank])}, **options)

    return on_ranks(len(states), one)


def saved(folder: Path, step: int, states: list[EngineState], **options: Any) -> Path:
    """Save as several ranks, which must go well."""
    results = save_all(folder, step, states, **options)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert len(set(results)) == 1
    return results[0]


def some_tensors(seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Weights, moments, a counter, a buffer of another dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (7, 5), "down": (3, 2, 11), "bias": (13,), "scale": ()}
    tensors = {}
    for name, shape in shapes.items():
        for kind in ("weight", "exp_avg"):
            tensors[kind, name] = torch.randn(shape, generator=generator)
        tensors["step", name] = torch.tensor(float(seed))
    tensors["buffer", "count"] = torch.tensor([seed, 2, 3])
    return tensors


def assert_holds(path: Path, tensors: Tensors, files: Files | None = None) -> None:
    """The checkpoint is these tensors, bit for bit."""
    with open_checkpoint(path, files) if files else open_checkpoint(path) as reader:
        assert {key: (tuple(spec.shape), spec.dtype) for key, spec in reader.index.items()} == {
            key: (tuple(t.shape), t.dtype) for key, t in tensors.items()
        }
        for (kind, name), tensor in tensors.items():
            out = torch.empty_like(tensor)
            reader.read_into(kind, name, whole(tensor.shape), out)
            assert same_bits(out, tensor), (kind, name)


def assert_fills(reader: CheckpointReader, states: list[EngineState]) -> None:
    """Every piece of these states reads as it is."""
    for state in states:
        for piece in state.pieces:
            out = torch.empty(piece.data.shape, dtype=piece.dtype)
            reader.read_into(piece.kind, piece.name, piece.box, out)
            assert same_bits(out, piece.data), piece


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def in_a_fork(function: Callable[[], Any]) -> int:
    """Run a function in a forked process: its exit status, as waitpid has it.

    With one thread: those that torch had before the fork are not there, and waiting for them would not end.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]
