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

from bigtrain.config.combinations import in_one_process, on_this_machine, refuse
from bigtrain.config.schema import Config, Engine

_WITHOUT_TORCH = ("bigtrain.cli", "bigtrain.config.loader", "numpy")
_WITH_TORCH = (
    *("bigtrain.running", "bigtrain.loop", "bigtrain.models", "bigtrain.data", "bigtrain.tracking.making"),
    *("bigtrain.engines.ddp", "bigtrain.engines.fsdp", "torch._dynamo", "torch.distributed.elastic.multiprocessing"),
)

_GPU_DEVICE = re.compile(r"nvidia\d+")


@dataclass(frozen=True)
class LaunchPlan:
    """How a run is started.

    Attributes:
        nproc: How many processes on each machine.
        program: The program of a rank, and its arguments, as Python's -m takes them.
        environment: What is added to the environment of every rank.
        debug: Show tracebacks of errors that are the user's.
        nodes: On how many machines.
        hang_timeout_s: How long a rank may make no progress; None: for ever.
        startup_timeout_s: How long everything up to the first step may take; None: for ever.
        max_restarts: How often it is started again in a row without a new checkpoint.
        leaves_result: Whether the run folder says of a run that has come to its end that it did.
        goes_on: Whether a start in the folder of a run that has begun goes on with it.
        preload: Modules that every rank imports before its first step; processes forked after that have them.
    """

    nproc: int
    program: tuple[str, ...]
    environment: Mapping[str, str]
    debug: bool = False
    nodes: int = 1
    hang_timeout_s: float | None = None
    startup_timeout_s: float | None = None
    max_restarts: int = 0
    leaves_result: bool = True
    goes_on: bool = True
    preload: tuple[str, ...] = ()

    @property
    def num_processes(self) -> int:
        """How many processes there are in all."""
        return self.nodes * self.nproc


def make_plan(
    config: Config,
    run_file: Path,
    overrides: Sequence[str],
    *,
    nproc: int | None = None,
    nodes: int | None = None,
    debug: bool = False,
    command: str = "train",
    threads: int | None = None,
) -> LaunchPlan:
    """Decide how a run is started.

    Args:
        config: The resolved run file.
        run_file: Where it is.
        overrides: What the command line changes in it.
        nproc: How many processes on each node, instead of `launch.nproc`.
        nodes: On how many nodes, instead of `launch.nodes`.
        debug: Show tracebacks of errors that are the user's.
        command: What each rank runs: train, or try.
        threads: Cores of each process; None: its share of this machine's.

    Raises:
        CombinationError: Where the engine runs in one process only and more are asked for, or this machine is to be
            several.
    """
    num_nodes = nodes or config.launch.nodes
    if config.launch.target == "local":
        refuse(on_this_machine(num_nodes))
    count = nproc or (config.launch.nproc if isinstance(config.launch.nproc, int) else count_gpus(config) or 1)
    if config.engine.name == "single":
        refuse(in_one_process(count * num_nodes))
    program = ("bigtrain", *(("--debug",) if debug else ()), command, str(run_file), *overrides)
    if threads is None or isinstance(config.run.threads, int):
        threads = threads_per_rank(config, count)
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    health = config.health
    return LaunchPlan(
        count,
        program,
        environment,
        debug,
        nodes=num_nodes,
        hang_timeout_s=health.hang_timeout_s,
        startup_timeout_s=health.startup_timeout_s,
        max_restarts=config.launch.max_restarts,
        goes_on=config.checkpoint.resume == "auto",
        preload=preloaded(config),
    )


def preloaded(config: Config) -> tuple[str, ...]:
    """What ranks are forked with on this machine.

    With a GPU nothing that may speak to the driver: a process that has spoken to it cannot be forked into ones that do.
    """
    if count_gpus(config):
        return _WITHOUT_TORCH
    engine = ("deepspeed",) if config.engine.name == "deepspeed" else ()
    return (*_WITHOUT_TORCH, *_WITH_TORCH, *engine)


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
    return count_gpus_of(config.engine)


def count_gpus_of(engine: Engine) -> int:
    """The same for the engine's section alone."""
    if engine.device == "cpu":
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
