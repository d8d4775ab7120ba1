"""Where the time and the memory of steps go: counted on every rank, summed up when there is a line of numbers.

Data wait and saving are told by the clock of the process that waits. What communication costs cannot be told so: it
runs beside the computing, in the same kernels' queue; the profile tells it (`profile.steps`).
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.dist import World

# A rank and what it used travel as one number, so that one reduction tells both.
_RANKS = 1 << 16
_SECONDS_BETWEEN = 1.0  # how often the system is asked for a peak, at most


class Meter:
    """Counts between two lines of numbers.

    Args:
        world: The ranks; the largest numbers among them are told, and whose they are.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._largest = torch.zeros(2, dtype=torch.int64)
        self._under_way: dist.Work | None = None
        self._found: dict[str, Any] = {}
        self._memory, self._asked_at = 0, -_SECONDS_BETWEEN
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = self._samples = 0
        self._waited = self._saved = self._elsewhere = 0.0

    def step(self, num_samples: int, waited: float) -> None:
        """Count a step: its samples, and the seconds that it waited for them."""
        self._steps += 1
        self._samples += num_samples
        self._waited += waited

    def saved(self, seconds: float) -> None:
        """Count what the training waited for a save."""
        self._saved += seconds

    def pause(self, seconds: float) -> None:
        """Take out time that was not training: an evaluation."""
        self._elsewhere += seconds

    def row(self, *, is_last: bool = False) -> dict[str, Any]:
        """What was counted, in seconds a step and bytes; counting begins anew. Every rank must call it.

        The largest over ranks are those of the row before, so that nobody waits for them; the last row's are its own.
        """
        now = time.perf_counter()
        seconds = max(now - self._since - self._elsewhere, 1e-9)
        steps = max(self._steps, 1)
        row = {
            "samples_per_s": self._samples / seconds,
            "step_s": seconds / steps,
            "data_wait_s": self._waited / steps,
            "save_s": self._saved / steps,
            "compute_s": max(seconds - self._waited - self._saved, 0.0) / steps,
        }
        if is_last or now - self._asked_at >= _SECONDS_BETWEEN:
            self._memory, self._asked_at = peak_memory(self._world.device), now
        row.update(self._over_ranks(self._waited / steps, is_last=is_last))
        self._reset()
        return row

    def _over_ranks(self, waited: float, *, is_last: bool) -> dict[str, Any]:
        memory = self._memory
        if self._world.size == 1:
            return {"peak_memory_bytes": memory}
        self._take()
        found = self._found or {"peak_memory_bytes": memory}
        self._largest[0] = memory * _RANKS + self._world.rank
        self._largest[1] = int(waited * 1e6) * _RANKS + self._world.rank
        self._under_way = dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=self._world.group, async_op=True)
        if is_last:
            self._take()
            found = self._found
        return found

    def _take(self) -> None:
        if self._under_way is None:
            return
        self._under_way.wait()
        self._under_way = None
        memory, waited = self._largest.tolist()
        self._found = {
            "peak_memory_bytes": memory // _RANKS,
            "peak_memory_rank": memory % _RANKS,
            "longest_data_wait_s": waited // _RANKS / 1e6,
            "longest_data_wait_rank": waited % _RANKS,
        }

    def close(self) -> None:
        """Wait for the reduction that is under way. Not after an error: that would wait for the others."""
        self._take()


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far: on a GPU of tensors, on a CPU of everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
