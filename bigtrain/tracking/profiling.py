"""A profile of a few steps on every rank: a trace, the operations that take longest, and on CUDA what fills the memory.

    <run>/profile/rank-00000.pt.trace.json.gz   for Perfetto and TensorBoard's profiler
    <run>/profile/rank-00000.txt                the operations that take longest
    <run>/profile/rank-00000.memory.pickle      on CUDA, for https://docs.pytorch.org/memory_viz; nothing here reads it

The parts of a step are ranges by name in the trace, and NVTX ranges for Nsight Systems. Without a profile none of this
is there: the functions are wrapped only where one is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bigtrain.dist import World
from bigtrain.tracking.communication import COMMUNICATION

_ROWS = 40
_MEMORY_EVENTS = 100_000
# What profilers count around operations, and not as one of their own.
_NO_OPERATION = ("ProfilerStep", "cudaDeviceSynchronize", "step", "loss", "backward", "update")


class Profiler:
    """Profiles the steps from `first` to before `end`, counted from 0. Every rank has one.

    Args:
        folder: The run folder.
        world: This rank's place.
        first: The steps taken when the profile begins.
        end: The steps taken when it ends.
        tell: Told of it as a row, on rank 0.
    """

    def __init__(
        self, folder: Path, world: World, first: int, end: int, tell: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._folder, self._world, self._first, self._end, self._tell = folder, world, first, end, tell
        self._profile: profile | None = None
        self._step: Any = None

    def at(self, step: int) -> None:
        """Look where the training is: so many steps have been taken."""
        if self._profile is None:
            if step == self._first:
                self._start()
        elif step >= self._end:
            self._stop()
        else:
            self._mark()

    def close(self) -> None:
        """Write what there is, where the run ends first."""
        if self._profile is not None:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            # With the stacks of C++ torch starts processes that look up their names, and leaves them running.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MEMORY_EVENTS)
        else:
            # Its library says on the terminal, as an error, that there is no GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        # It keeps events over several cycles, of which there is one, or says in every run that it does not.
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
        self._profile.start()
        self._mark()

    def _mark(self) -> None:
        self._unmark()
        self._step = Range("step")
        self._step.__enter__()

    def _unmark(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self) -> None:
        assert self._profile is not None
        self._unmark()
        done, self._profile = self._profile, None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        done.stop()
        folder = self._folder / "profile"
        folder.mkdir(exist_ok=True)
        name = f"rank-{self._world.rank:05d}"
        done.export_chrome_trace(str(folder / f"{name}.pt.trace.json.gz"))
        averages = done.key_averages()
        on_cuda = self._world.device.type == "cuda"
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
        (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        if on_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._world.is_main:
            share = communication_share(averages, on_cuda=on_cuda)
            steps = f"steps {self._first} to {self._end - 1}"
            row = {"step": self._end, "event": "profile", "text": f"{steps}, in {folder}", "communication": share}
            self._tell(row)


def communication_share(averages: Any, *, on_cuda: bool) -> float:
    """The share of the operations' own time that goes into communication, 0 to 1."""
    times = {
        average.key: average.self_device_time_total if on_cuda else average.self_cpu_time_total
        for average in averages
        if average.key not in _NO_OPERATION
    }
    whole = sum(times.values())
    spoken = sum(value for key, value in times.items() if COMMUNICATION.search(key))
    return round(spoken / whole, 4) if whole else 0.0


class Range:
    """A named part of the time, in the profiler's trace and as an NVTX range.

    Args:
        name: What it is called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._record = record_function(name)

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]
        self._record.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._record.__exit__(*error)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def name_parts(engine: Any, task: Any) -> None:
    """Let the parts of a step be seen by their names: the loss, the backward pass, the update."""
    for owner, method, name in ((task, "loss", "loss"), (engine, "backward", "backward"), (engine, "step", "update")):
        call = getattr(owner, method)

        def ranged(*args: Any, _call: Callable[..., Any] = call, _name: str = name, **options: Any) -> Any:
            with Range(_name):
                return _call(*args, **options)

        setattr(owner, method, ranged)
