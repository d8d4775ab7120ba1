"""Runs a module so that it never outlives its parent: `python -m launchers.guarded MODULE ARGUMENTS…`.

Everything a launcher starts is started this way. A rank also gets here what it must know of its start, where only
the scheduler's variables say it, and writes its stacks when the launcher asks for them: from its first moment on,
whatever it is doing, also where it holds the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

from bigtrain.beats import AGAIN, STACKS_SIGNAL
from bigtrain.runs import ATTEMPT_VARIABLE

# The launcher sets it for tasks of a step in an allocation.
STEP_VARIABLE = "BIGTRAIN_STEP"

# Set where the ranks of a machine share one log, which the scheduler writes.
SHARED_LOG_VARIABLE = "BIGTRAIN_SHARED_LOG"

# What the process of a rank that was forked is called, with its number.
RANK_NAME = "bigtrain-"

# On the ranks' stderr, when all of them have ended: what comes later is of the next attempt.
END_OF_ATTEMPT = b"\0end of attempt\0\n"

# What the server that ranks are forked from imports, separated by commas.
PRELOAD_VARIABLE = "BIGTRAIN_PRELOAD"

# The process that started this one: Python's server lives on while there are ranks, who must end with the agent.
PARENT_VARIABLE = "BIGTRAIN_PARENT"

_OF_SCHEDULER = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "GROUP_RANK": "SLURM_NODEID",
}
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # of <linux/prctl.h>


def stacks_of(attempt: Path, rank: int) -> Path:
    """Where a rank of an attempt writes its stacks."""
    return attempt / "stacks" / f"rank-{rank:05d}.txt"


def end_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process when its parent ends; it stays so over exec. Only Linux can.

    Args:
        parent: Who that is: where it has ended already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """What lists of processes call this one: 15 characters at most."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def set_place() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from the scheduler's variables in a task of a launcher's step."""
    if STEP_VARIABLE in os.environ:
        for ours, theirs in _OF_SCHEDULER.items():
            os.environ[ours] = os.environ[theirs]


def write_stacks_when_asked() -> None:
    """Write the stacks of all threads to the attempt's folder whenever the launcher's signal comes."""
    attempt, rank = os.environ.get(ATTEMPT_VARIABLE), os.environ.get("RANK")
    if attempt is None or rank is None:
        return
    path = stacks_of(Path(attempt), int(rank))
    try:
        path.parent.mkdir(exist_ok=True)
        file = path.open("a")
    except OSError as error:  # a full disk must not keep a run from starting
        print(f"rank {rank}: no stacks can be written to {path}: {error.strerror}", file=sys.stderr)
        return
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def write_to_own_log() -> None:
    """Send what a rank other than 0 prints, native code included, to logs of its own in the attempt's folder."""
    attempt, rank = os.environ.get(ATTEMPT_VARIABLE), os.environ.get("RANK", "0")
    if attempt is None or rank == "0" or SHARED_LOG_VARIABLE in os.environ:
        return
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = Path(attempt, "logs", f"rank-{int(rank):05d}.{name}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)


def leave_when_told_to_save() -> None:
    """Until the training can save, there is nothing to save: a rank that is told to leaves, to be started again."""
    if "RANK" in os.environ:
        signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(AGAIN))


def main() -> None:
    """Guard this process, then be the module."""
    end_with_parent()
    set_place()
    leave_when_told_to_save()
    write_to_own_log()
    write_stacks_when_asked()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
