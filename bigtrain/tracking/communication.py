"""How much of a step is communication alone: one step now and then under torch's profiler.

A step computes and communicates side by side. What it loses to communication is the time in which nothing else goes
on, waiting for slower ranks included; no clock beside the step can tell it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.profiler import ProfilerActivity, profile

from bigtrain.dist import World

COMMUNICATION = re.compile(r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|broadcast", re.IGNORECASE)
_COMPUTING = "aten::"  # on a CPU; ranges around them wait, too

Interval = tuple[float, float]


class Communication:
    """Measures it on rank 0, half-way between steps at which runs evaluate and save.

    Args:
        world: This rank's place.
        every: Steps from one that is measured to the next.
        profiled: The first of the steps that a profile of its own is of, and the one after the last: two cannot run.
    """

    def __init__(self, world: World, every: int, profiled: Sequence[int] = ()) -> None:
        self._is_on_gpu, self._every = world.device.type == "cuda", every
        self._left_out = range(profiled[0] - 1, profiled[1]) if profiled else range(0)
        self._profile: profile | None = None

    def at(self, step: int) -> float | None:
        """Look where the training is, so many steps having been taken: the last step's seconds, if it was measured."""
        if self._profile is not None:
            return self._stop()
        is_due = (step + 1 - self._every // 2) % self._every == 0 and step not in self._left_out
        if is_due and not _profiler_enabled():  # by the user's own code
            self._start()
        return None

    def close(self) -> None:
        """Measure no more."""
        if self._profile is not None:
            self._stop()

    def _start(self) -> None:
        if self._is_on_gpu:
            torch.cuda.synchronize()
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it says, as an error, that there is no GPU
        activity = ProfilerActivity.CUDA if self._is_on_gpu else ProfilerActivity.CPU
        self._profile = profile(activities=[activity], acc_events=True)
        self._profile.start()

    def _stop(self) -> float:
        """Seconds of communication alone."""
        assert self._profile is not None
        done, self._profile = self._profile, None
        if self._is_on_gpu:
            torch.cuda.synchronize()
        done.stop()
        events: Any = done.events()  # type: ignore[no-untyped-call]
        spoken, busy = _told_apart(events, is_on_gpu=self._is_on_gpu)
        return alone(spoken, busy) / 1e6


def _told_apart(events: Iterable[Any], *, is_on_gpu: bool) -> tuple[list[Interval], list[Interval]]:
    """When there was communication, and when anything else; in microseconds."""
    spoken: list[Interval] = []
    busy: list[Interval] = []
    for event in events:
        if is_on_gpu != (event.device_type == DeviceType.CUDA):
            continue
        interval = (event.time_range.start, event.time_range.end)
        if not is_on_gpu and event.name.startswith(_COMPUTING):  # aten::broadcast_tensors among them
            busy.append(interval)
        elif COMMUNICATION.search(event.name):
            spoken.append(interval)
        elif is_on_gpu:
            busy.append(interval)
    return spoken, busy


def alone(spoken: Iterable[Interval], busy: Iterable[Interval]) -> float:
    """How long at least one of the first lasted, and none of the second."""
    busy = list(busy)
    return _length([*spoken, *busy]) - _length(busy)


def _length(intervals: Iterable[Interval]) -> float:
    """How long at least one of them lasted."""
    length, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
