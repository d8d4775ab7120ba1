"""When checkpoints are saved, how long they are kept, and what happens when they cannot be: the loop's `Saver`.

It knows the checkpoint store and the run file's section, and neither engine nor data: what belongs to a checkpoint is
asked of whoever made it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import Background, Ranks, bytes_of, check_space, find_best, prune, save
from bigtrain.checkpoint.files import DISK, Files
from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.errors import DiskFullError
from bigtrain.goals import BEST, Standing
from bigtrain.progress import Outcome
from bigtrain.state import EngineState

_log = logging.getLogger(__name__)

# What names, hashes, hyperparameters and random numbers take, measured: it matters for small models alone.
_BYTES_A_RANK, _BYTES_A_TENSOR, _SLOTS = 20_000, 270, 3


@dataclass(frozen=True)
class Source:
    """What a checkpoint is made of, asked on every rank when one is saved.

    Attributes:
        state: This rank's part of the training state.
        extra: What else belongs to it, the same on all ranks.
        own: What else belongs to this rank alone.
    """

    state: Callable[[], EngineState]
    extra: Callable[[Outcome], Mapping[str, Any]]
    own: Callable[[], Mapping[str, Any]]


class Keeper:
    """Saves and keeps the checkpoints of one run. Every rank must make it, and make the same calls.

    Args:
        world: The ranks.
        folder: Where checkpoints lie.
        policy: The run file's section.
        source: What they are made of.
        attempt: Which start of the run this is, the same on all ranks.
        still_ours: Asked on rank 0 before a commit; False where another start owns the run now.
        tell: Told on rank 0 of every checkpoint, as a line of numbers and words.
        before_save: Called before one is begun: what goes before it must be written before it.
        files: The file system.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        policy: schema.Checkpoint,
        source: Source,
        *,
        attempt: str = "0",
        still_ours: Callable[[], bool] = lambda: True,
        tell: Callable[[Mapping[str, Any]], None] = lambda row: None,
        before_save: Callable[[], None] = lambda: None,
        files: Files = DISK,
    ) -> None:
        self._world, self._folder, self._policy, self._source = world, Path(folder), policy, source
        self._attempt, self._still_ours, self._tell, self._files = attempt, still_ours, tell, files
        self._before_save = before_save
        self._background = (
            Background(
                world,
                self._folder,
                attempt=attempt,
                still_ours=still_ours,
                committed=self._prune,
                files=files,
            )
            if policy.background
            else None
        )
        self._saved_step: int | None = None
        self._began: dict[int, float] = {}
        self._best: Standing | None = None
        self._saved_at = time.monotonic()

    def expect(self, num_bytes: int, saved_step: int | None) -> None:
        """Get ready before the first step: see that checkpoints will fit, and have memory for a copy of the state.

        Args:
            num_bytes: How much this rank will write.
            saved_step: The step from which the run goes on, which is saved already.

        Raises:
            DiskFullError: On all ranks, where two checkpoints would not fit on the disk.
        """
        self._saved_step = saved_step
        if self._world.is_main and saved_step is not None:
            self._prune(self._folder)  # what a start that was killed left behind
        policy = self._policy
        if not (policy.every_steps or policy.every_minutes or policy.at_end or policy.keep_best):
            return
        check_space(Ranks(self._world), self._folder, num_bytes, files=self._files)
        if self._background:
            self._background.reserve(num_bytes)

    def is_due(self, step: int) -> bool:
        """Whether the state after this step is to be saved, by the number of steps."""
        every = self._policy.every_steps
        return every is not None and step % every == 0

    def is_late(self) -> bool:
        """Whether it is to be saved by the clock, said once each time; rank 0's decides."""
        minutes, now = self._policy.every_minutes, time.monotonic()
        if minutes is None or not self._world.is_main or now - self._saved_at < 60 * minutes:
            return False
        self._saved_at = now  # several ranks save a step later: until then it would be said again
        return True

    def save(self, outcome: Outcome) -> None:
        """Save the state as it is now; in the background it is written while the training goes on.

        Raises:
            SaveError: On all ranks, why it, or the one before, was not written; nothing was committed then.
        """
        step, self._saved_at = outcome.steps, time.monotonic()
        if step == self._saved_step:
            return
        self._before_save()
        if self._background:  # what came of the last one is told, and this one is saved whatever that was
            self._hear(partial(self._background.wait, before=step))
        content = {"extra": self._source.extra(outcome), "own": self._source.own()}
        self._began[step] = time.monotonic()
        best = outcome.standings.get(BEST)
        self._best = best if self._policy.keep_best and best and best.value is not None else None
        try:
            if self._background:
                self._background.start(step, self._source.state(), extra=content["extra"], own=content["own"])
                self._saved_step = step
                return
            path = save(
                Ranks(self._world),
                self._folder,
                step,
                self._source.state(),
                extra=content["extra"],
                own=content["own"],
                attempt=self._attempt,
                still_ours=self._still_ours,
                files=self._files,
            )
        except DiskFullError as error:
            self._on_full(error)
            return
        self._saved_step = step
        if self._world.is_main:
            self._prune(path)
        self._say(path)

    def wait_for_copy(self) -> None:
        """Wait until the state that is being saved is free to change, before the optimizer changes it."""
        if self._background:
            self._background.wait_for_copy()

    def poll(self) -> None:
        """Hear of what has been written, once a step.

        Raises:
            SaveError: On all ranks, why it was not.
        """
        if self._background:
            self._hear(self._background.poll)

    def commit(self, outcome: Outcome) -> None:
        """Save the state whatever the policy, if it is not saved yet, and wait until it is on the disk.

        Raises:
            SaveError: On all ranks, why it was not: the training cannot go on without it.
        """
        self.settle()
        self._save_at_last(outcome, "the checkpoint from which the next phase goes on")

    def finish(self, outcome: Outcome) -> None:
        """Save the state at the end, if it is wanted and is not saved yet, and wait until it is on the disk.

        Raises:
            SaveError: On all ranks, why it was not, whatever `on_full` says: there is no later.
        """
        self.settle()
        if outcome.stopped or self._policy.at_end:
            self._save_at_last(outcome, "the last checkpoint, without which what was trained is lost")

    def _save_at_last(self, outcome: Outcome, what: str) -> None:
        self.save(outcome)
        self.settle()
        if self._saved_step != outcome.steps:  # on_full=continue has nothing to continue with
            raise DiskFullError(
                f"the disk has no room for {what}",
                where=str(self._folder),
                remedy="make room, and start the run again",
            )

    def settle(self) -> None:
        """Wait for what is being written, and save nothing more."""
        if self._background:
            self._hear(self._background.wait)

    def close(self) -> None:
        """Let go of everything, after `finish`. Every rank must call it."""
        if self._background:
            self._background.close()

    def _hear(self, listen: Callable[[], Path | None]) -> None:
        try:
            path = listen()
        except DiskFullError as error:
            self._saved_step = None
            self._on_full(error)
        else:
            if path:
                self._say(path)

    def _on_full(self, error: DiskFullError) -> None:
        if self._policy.on_full == "stop":
            raise error
        if self._world.is_main:
            _log.warning("%s\n  the training goes on without it, as checkpoint.on_full says", error)
            self._tell({"step": max(self._began, default=0), "event": "no checkpoint", "reason": error.problem})

    def _prune(self, committed: Path) -> None:
        """Remove what is not kept; on rank 0, after a commit or at the start."""
        policy = self._policy
        try:
            best = find_best(self._folder, self._files) if policy.keep_best and policy.keep else None
            prune(self._folder, policy.keep, policy.keep_every, stays=best, files=self._files)
        except OSError as error:
            _log.warning("old checkpoints in %s cannot be removed: %s", self._folder, error)

    def _say(self, path: Path) -> None:
        if not self._world.is_main:
            return
        step = int(path.name.removeprefix("step-"))
        try:
            num_bytes = sum(entry.stat().st_size for entry in path.iterdir())
        except OSError as error:  # somebody has moved it: that is no reason to stop
            _log.warning("the checkpoint of step %d was written, and is not there any more: %s", step, error)
            return
        seconds = time.monotonic() - self._began.pop(step, time.monotonic())
        best = {"best": str(self._best)} if self._best and self._best.step == step else {}
        written = {"path": str(path), "bytes": num_bytes, "seconds": seconds}
        self._tell({"step": step, "event": "checkpoint", **written, **best})


def expected_bytes(state: EngineState, trained: set[str], slot_bytes: float) -> int:
    """How much this rank will write in a checkpoint, before the optimizer has made its state.

    Args:
        state: As it is before the first step, or as it was loaded.
        trained: The parameters that the optimizer updates.
        slot_bytes: What the optimizer will keep for each of their elements.
    """
    present = bytes_of(state) + _BYTES_A_RANK + _BYTES_A_TENSOR * sum(piece.is_owner for piece in state.pieces)
    has_slots = any(piece.kind not in ("weight", "buffer", "ema") and piece.data.ndim for piece in state.pieces)
    if has_slots:
        return present
    mine = [p for p in state.pieces if p.is_owner and p.kind == "weight" and p.name in trained]
    names = _BYTES_A_TENSOR * _SLOTS * len(mine)
    return present + names + round(sum(p.data.numel() for p in mine) * slot_bytes)
