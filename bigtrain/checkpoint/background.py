"""Writing a checkpoint while the training goes on.

The state is copied to host memory that exists already, and a thread writes the copy as `save` would. The training
waits for a copy of the weights alone: what only the optimizer changes is copied while the next gradients are computed,
on a host by that thread, on a GPU by the engine that it has for copies.
Ranks talk over a group of their own, so that what they say cannot be mistaken for what the training says. That it is
done, or has failed, every rank hears in the same step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.ranks import Ranks
from bigtrain.checkpoint.writing import bytes_of, in_file_order, save
from bigtrain.dist import World
from bigtrain.errors import SaveError
from bigtrain.state import BUFFER, WEIGHT, EngineState, Piece

_log = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.5  # of what is free: the training and the page cache need some, too
# A forward pass may change these: running statistics, and weights that a model keeps within bounds.
_CHANGED_BY_FORWARD = (WEIGHT, BUFFER)


@dataclass
class _Prepared:
    """What is to be written.

    Attributes:
        state: In our own memory, or the state itself.
        is_copy: Which of the two.
        image: All of the copy, as it will lie in the file.
        rest: What of the copy is still to be made: to where, and of what.
        ready: Called before the state is read.
    """

    state: EngineState
    is_copy: bool = True
    image: memoryview | None = None
    rest: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    ready: Callable[[], None] = lambda: None

    def copy_rest(self) -> None:
        """Make the rest of the copy; a failure waits for `ready`: this rank must not stay away where others meet."""
        try:
            with torch.no_grad():
                for target, source in self.rest:
                    target.copy_(source)
        except Exception as error:
            self.ready = partial(_fail, error)
        self.rest = []


class _Beside:
    """Copies that a GPU makes beside its work: after what it has been told to do so far, before what changes them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sources: list[Tensor] = []  # memory that was freed now could be written to while it is read

    def copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy to the first of each two what is in the second; the current stream goes on."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._sources = [source for _, source in copies]
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        self._done.record(self._stream)

    def hold_back(self) -> None:
        """What the current stream is told from now on comes after the copies."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def wait(self) -> None:
        """Until all has been copied, what the current stream was told to copy before included."""
        self._done.synchronize()
        self._sources = []


class Background:
    """Writes one checkpoint at a time. Every rank must make it, and make the same calls.

    Args:
        world: The ranks.
        folder: Where checkpoints lie.
        attempt: Which start of the run this is, the same on all ranks.
        still_ours: Asked on rank 0, in the writing thread, before the commit.
        committed: Called on rank 0, in the writing thread, after it.
        files: The file system.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        attempt: str = "0",
        still_ours: Callable[[], bool] = lambda: True,
        committed: Callable[[Path], None] = lambda path: None,
        files: Files = DISK,
    ) -> None:
        self._world = world
        group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._group = group
        self._ranks = Ranks(replace(world, group=group))
        self._save: Callable[..., Path] = lambda *args, **options: save(
            self._ranks, Path(folder), *args, attempt=attempt, still_ours=still_ours, files=files, **options
        )
        self._committed = committed
        self._files = files
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._beside = _Beside(world.device) if world.device.type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._outcome: Path | BaseException | None = None
        self._is_copied = threading.Event()
        self._num_done = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def reserve(self, num_bytes: int) -> None:
        """Have host memory for a copy of this size (`bytes_of`), so that the first save costs no more than others.

        Where it does not fit, that is said, and the training waits while checkpoints are written.
        """
        missing = num_bytes - self._buffer.numel()
        if missing <= 0:
            return
        free = self._files.free_memory()
        if free is not None and missing > free * _SHARE_OF_MEMORY:
            self._say_that_it_does_not_fit(num_bytes, f"and {free:,} are free")
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of the smaller one first
        try:
            self._buffer = self._memory(num_bytes)
        except (RuntimeError, OSError) as error:  # a system may allow less of it to be pinned, or to one process
            self._say_that_it_does_not_fit(num_bytes, f"which cannot be had ({str(error).partition(chr(10))[0]})")

    def _memory(self, num_bytes: int) -> Tensor:
        if self._beside is not None:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).zero_()
        return torch.frombuffer(self._files.memory(num_bytes), dtype=torch.uint8).zero_()

    def _say_that_it_does_not_fit(self, num_bytes: int, why: str) -> None:
        _log.warning(
            "rank %d: a copy of the state needs %s bytes of host memory, %s: "
            "the training waits while checkpoints are written",
            *(self._world.rank, f"{num_bytes:,}", why),
        )

    def start(
        self, step: int, state: EngineState, *, extra: Mapping[str, Any], own: Mapping[str, Any] | None = None
    ) -> None:
        """Begin to copy the state and to write it; if the last checkpoint is still being written, wait for that first.

        Args:
            step: How many steps have been taken.
            state: This rank's part of the state; its weights and buffers are free to change as soon as this returns,
                the rest after `wait_for_copy`.
            extra: As in `save`.
            own: As in `save`.

        Raises:
            SaveError: Why the last checkpoint was not written; this one is not begun then.
        """
        self.wait(before=step)
        prepared = self._prepared(state)
        kept = deepcopy({"extra": extra, "own": own})
        self._is_copied.clear()

        def write() -> None:
            try:
                try:
                    prepared.copy_rest()
                finally:
                    self._is_copied.set()  # whatever happens: the training waits for it
                path = self._save(step, prepared.state, ready=prepared.ready, image=prepared.image, **kept)
                if self._world.is_main:
                    self._committed(path)
                self._outcome = path
            except BaseException as error:
                self._outcome = error

        self._outcome = None
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if not prepared.is_copy:
            self._thread.join()

    def wait_for_copy(self) -> None:
        """Wait until all of the state that is being saved is free to change; the optimizer steps after that.

        On a GPU it is the current stream that waits.
        """
        if self._thread is not None:
            self._is_copied.wait()
        if self._beside is not None:
            self._beside.hold_back()

    def poll(self) -> Path | None:
        """The checkpoint that has been committed since the last call. Every rank must call it once a step.

        Nobody waits: what is asked in one step is answered in the next.

        Raises:
            SaveError: Why it was not written.
        """
        if self._thread is None:
            return None
        if self._world.size == 1:
            return None if self._thread.is_alive() else self.wait()
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._num_done.item() == self._world.size:
                return self.wait()
        self._num_done.fill_(not self._thread.is_alive())
        self._work = dist.all_reduce(self._num_done, group=self._world.group, async_op=True)
        return None

    def wait(self, *, before: int | None = None) -> Path | None:
        """Wait until nothing is being written: the checkpoint that has been committed. Every rank must call it.

        Args:
            before: The step whose checkpoint is due already: that the training waits is said then.

        Raises:
            SaveError: Why it was not written.
        """
        if before is not None and self._thread and self._thread.is_alive() and self._world.is_main:
            words = "step %d: waiting for the last checkpoint; they are due faster than the disk takes them"
            _log.warning(words, before)
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, SaveError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise SaveError(f"the writing thread failed: {type(outcome).__name__}: {outcome}") from outcome
        return outcome

    def close(self) -> None:
        """Let go of the group and the memory. Every rank must call it, with nothing being written."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _prepared(self, state: EngineState) -> _Prepared:
        needed = bytes_of(state)
        try:
            if self._beside is not None:
                self._beside.wait()  # for a save that failed before it did; it must not write into this one's copy
            self.reserve(needed)
            if needed > self._buffer.numel():
                return _Prepared(state, is_copy=False)
            return self._copy(in_file_order(state.pieces), state.hyper)
        except Exception as error:  # this rank must not stay away where the others meet
            return _Prepared(state, ready=partial(_fail, error))

    def _copy(self, held: Sequence[Piece], hyper: dict[str, dict[str, Any]]) -> _Prepared:
        """These pieces in our own memory, one after the other, as they will lie in the file."""
        prepared = _Prepared(EngineState([], hyper))
        place = 0
        beside: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for piece in held:
                data, device = self._place(piece.data, place), piece.data.device.type
                is_on_gpu = self._beside is not None and device == "cuda"
                if piece.kind in _CHANGED_BY_FORWARD or not (is_on_gpu or device == "cpu"):
                    data.copy_(piece.data, non_blocking=is_on_gpu)  # a GPU copies in the order of its work
                else:
                    (beside if is_on_gpu else prepared.rest).append((data, piece.data))
                prepared.state.pieces.append(replace(piece, data=data))
                place += data.nbytes
            if self._beside is not None:
                self._beside.copy(beside)
                prepared.ready = self._beside.wait
        prepared.image = self._buffer[:place].numpy().data
        return prepared

    def _place(self, like: Tensor, place: int) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        place = place if num_bytes else 0  # what is empty comes last, where its type may not begin
        return self._buffer[place : place + num_bytes].view(like.dtype).view(like.shape)


def _fail(error: Exception) -> None:
    raise error
