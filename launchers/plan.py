"""What will be started, as data: which command, how many processes, in which environment.

A plan is a pure function of the run file, the command line and the machine; launchers carry it out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.errors import CombinationError

_GPU_DEVICE = re.compile(r"nvidia\d+")


@dataclass(frozen=True)
class LaunchPlan:
    """One start of a run on this machine.

    Attributes:
        nproc: How many processes.
        program: The program of a rank, and its arguments, as Python's -m takes them.
        environment: What is added to the environment of every rank.
        debug: Show tracebacks of errors that are the user's.
    """

    nproc: int
    program: tuple[str, ...]
    environment: Mapping[str, str]
    debug: bool = False


def make_plan(
    config: Config,
    run_file: Path,
    overrides: Sequence[str],
    *,
    nproc: int | None = None,
    debug: bool = False,
    command: str = "train",
) -> LaunchPlan:
    """Decide how a run is started on this machine.

    Args:
        config: The resolved run file.
        run_file: Where it is.
        overrides: What the command line changes in it.
        nproc: How many processes, instead of `launch.nproc`.
        debug: Show tracebacks of errors that are the user's.
        command: What each rank runs: train, or try.

    Raises:
        CombinationError: Where the engine runs in one process only and more are asked for.
    """
    count = nproc or (config.launch.nproc if isinstance(config.launch.nproc, int) else count_gpus(config) or 1)
    if config.engine.name == "single" and count > 1:
        raise CombinationError(
            f"the engine single runs in one process, and {count} are to be started",
            where="engine.name",
            remedy="set engine.name to ddp, fsdp or auto, or launch.nproc to 1",
        )
    program = ("bigtrain", *(("--debug",) if debug else ()), command, str(run_file), *overrides)
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads_per_rank(config, count))}
    return LaunchPlan(count, program, environment, debug)


def threads_per_rank(config: Config, nproc: int) -> int:
    """Threads of each rank: its share of the cores. Ranks that each take all of them are many times slower."""
    if isinstance(config.run.threads, int):
        return config.run.threads
    return max(1, count_cores() // nproc)


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(config: Config) -> int:
    """NVIDIA GPUs that ranks would see, without asking torch."""
    if config.engine.device == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    try:
        return sum(bool(_GPU_DEVICE.fullmatch(name)) for name in os.listdir("/dev"))
    except OSError:
        return 0


def interpreter() -> str:
    """The Python that ranks run in: this one."""
    return sys.executable
