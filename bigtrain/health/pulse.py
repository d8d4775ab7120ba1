"""This rank's progress, told to the launcher that watches it.

The training only counts: a thread of its own reads the numbers and sends them. A rank whose thread can send no more
has lost its launcher, and ends itself: nobody would see it hang, or stop it.
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from bigtrain.beats import FINISHING, INTERVAL_S, STARTING, Address, Beat, map_steps, write_step
from bigtrain.dist import World
from bigtrain.protocols import Batch, LossSum, Task
from bigtrain.runs import RunFolder

# Steps over which a rank's own time is taken: the middle one of them, so that one that was disturbed does not count.
_WINDOW = 12
_CONNECT_TIMEOUT_S = 30.0
# What metrics import may come over a network's file system.
_LONGEST_IMPORT_S = 300.0


class Pulse:
    """Counts what a rank gets done.

    Attributes:
        count: Microbatches, evaluation batches and written chunks so far.
        batches: The first two alone.
        phase: What the rank is doing; the words are in `bigtrain.beats`.
        step: Steps taken.
    """

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self.step = 0
        self.phase = STARTING
        self._own_s = 0.0
        self._memory: mmap.mmap | None = None
        self._rank = 0
        self._own_ms: deque[float] = deque(maxlen=_WINDOW)

    def keep_step_in(self, memory: mmap.mmap | None, rank: int) -> None:
        """Keep the number of steps in the launcher's memory as well."""
        self._memory, self._rank = memory, rank

    def beat(self) -> None:
        """Note that something was done."""
        self.count += 1

    def spent(self, seconds: float) -> None:
        """Note time that this rank spent waiting for no other."""
        self._own_s += seconds

    def stepped(self, step: int) -> None:
        """Note that a step is complete."""
        self.step = step
        if self._memory is not None:
            write_step(self._memory, self._rank, step)
        self._own_ms.append(self._own_s * 1000)
        self._own_s = 0.0

    @property
    def own_ms(self) -> float:
        """Milliseconds of its own in the middle one of the last steps; 0 before there are enough of them."""
        taken = list(self._own_ms)
        return statistics.median(taken) if len(taken) == _WINDOW else 0.0

    @property
    def least_own_ms(self) -> float:
        """The least of the last steps; 0 before there are enough of them."""
        taken = list(self._own_ms)
        return min(taken) if len(taken) == _WINDOW else 0.0

    @contextmanager
    def beating(self, at_most_s: float) -> Iterator[None]:
        """Around something that gets on without telling: it counts as progress for so long.

        Args:
            at_most_s: After how many seconds it may be a hang after all.
        """
        is_over = threading.Event()

        def beat() -> None:
            until = time.monotonic() + at_most_s
            while time.monotonic() < until and not is_over.wait(INTERVAL_S):
                self.beat()

        threading.Thread(target=beat, name="beating", daemon=True).start()
        try:
            yield
        finally:
            is_over.set()

    def watched(self, task: Task, *, is_own: bool) -> Watched:
        """The task, counting each microbatch.

        Args:
            task: Whose loss is computed.
            is_own: Whether no rank waits for another in a forward pass, so that its duration tells who is slow.
        """
        return Watched(task, self, is_own)


class Watched:
    """A task that tells a pulse of each microbatch it is asked for."""

    def __init__(self, task: Task, pulse: Pulse, is_own: bool) -> None:
        self._task, self._pulse, self._is_own = task, pulse, is_own

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The task's loss."""
        began = time.perf_counter()
        result = self._task.loss(model, batch)
        if self._is_own:
            self._pulse.spent(time.perf_counter() - began)
        self._pulse.batches += 1
        self._pulse.beat()
        return result

    def metrics(self) -> Any:
        """The task's metrics; the first import what they need, seconds in which no batch could be counted."""
        with self._pulse.beating(_LONGEST_IMPORT_S):
            return self._task.metrics()


@contextmanager
def told(pulse: Pulse, world: World) -> Iterator[None]:
    """Send the pulse to the launcher while the training runs; without a launcher nothing is sent."""
    address = Address.of_environment()
    if address is None:
        yield
        return
    pulse.keep_step_in(map_steps(), world.rank)
    teller = _Teller(pulse, world, address)
    teller.start()
    try:
        yield
    finally:
        teller.stop()


@contextmanager
def stop_wished(folder: RunFolder, ask: Callable[[], None]) -> Iterator[None]:
    """See now and then whether somebody wishes this start of the run to stop, and ask for it then. On rank 0.

    Args:
        folder: Where the wish is left.
        ask: What asks all ranks.
    """
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(INTERVAL_S):
            if folder.is_to_stop():
                ask()
                return

    thread = threading.Thread(target=look, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=2 * INTERVAL_S)


class _Teller:
    def __init__(self, pulse: Pulse, world: World, address: Address) -> None:
        self._pulse, self._world, self._address = pulse, world, address
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join(timeout=2 * INTERVAL_S)

    def _run(self) -> None:
        beat = Beat(self._address.token, self._world.rank, os.getpid(), socket.gethostname())
        try:
            place = (self._address.host, self._address.port)
            with socket.create_connection(place, timeout=_CONNECT_TIMEOUT_S) as connection:
                is_last = False
                while not is_last:
                    is_last = self._done.is_set()  # the last beat says that this rank comes to its end
                    self._fill(beat)
                    connection.sendall(beat.line())
                    self._done.wait(INTERVAL_S)
        except OSError:
            if self._pulse.phase != FINISHING:
                # No clean-up: it could wait for ranks that have ended.
                print(f"rank {self._world.rank}: the launcher is gone, so this rank ends", flush=True)
                os._exit(1)

    def _fill(self, beat: Beat) -> None:
        pulse = self._pulse
        beat.count, beat.step, beat.phase, beat.own_ms = pulse.count, pulse.step, pulse.phase, pulse.own_ms
        beat.least_own_ms, beat.batches = pulse.least_own_ms, pulse.batches
        beat.collectives = self._collectives()

    def _collectives(self) -> int:
        group = self._world.group
        if group is None or not dist.is_initialized():
            return -1
        try:
            return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
        except RuntimeError:  # the group is being taken apart
            return -1
