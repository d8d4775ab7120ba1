"""Several ranks on this machine, started from Python: for `bigtrain parity` and for tests.

They meet through a file, so no port is taken; they are forked from a server that has torch imported, so they start in
a fraction of a second. A training run is started by a launcher instead, which owns logs and restarts.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.errors import BigtrainError, RankError

_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.nn.parallel", "torchmetrics", "bigtrain.loop"]

_DEEPSPEED = ["deepspeed", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer"]
_COMPILER = ["torch._inductor.compile_fx", "torch._dynamo.repro.after_aot"]


def preload_engines() -> None:
    """Import DeepSpeed and torch's compiler once, in the process that ranks are forked from, and not in every rank.

    It counts before the first ranks are started. With a GPU nothing is done: a process that may have spoken to the
    driver cannot be forked into ones that do.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where deepspeed is imported
    named = [f"bigtrain.engines.{name}" for name in ("ddp", "fsdp", "deepspeed")]
    _PRELOAD.extend(module for module in (*_DEEPSPEED, *_COMPILER, *named) if module not in _PRELOAD)


def run_ranks(
    func: Callable[..., Any],
    world_size: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float = 600.0,
    strict: bool = False,
) -> list[Any]:
    """Call `func(*args)` in `world_size` processes of one group and return what each returned, by rank.

    Args:
        func: A plain top-level function. RANK, LOCAL_RANK and WORLD_SIZE are set, and the default process group is
            there.
        world_size: How many processes.
        args: Its arguments; they are pickled.
        timeout_s: How long all of it may take.
        strict: Make warnings errors.

    Raises:
        RankError: With the traceback of the rank that failed first, or every rank's stack where they did not answer
            in time.
        BigtrainError: What a rank raised, if it is one of ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        receivers, processes = [], []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                # Not daemons: those may have no data workers. They are ended below, whatever happens.
                given = (func, rank, world_size, folder, sender, tuple(args), strict)
                process = context.Process(target=_work, args=given)
                process.start()
                sender.close()
                receivers.append(receiver)
                processes.append(process)
            return _collect(receivers, processes, folder, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                process.kill()
                process.join()


def _collect(receivers: list[Connection], processes: list[Any], folder: str, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(receivers)) if rank not in results]
            raise RankError(f"ranks {late} did not answer in time\n{_stacks(processes, folder)}")
        answers = {
            rank: _answer(rank, receivers[rank], processes[rank])
            for rank, receiver in enumerate(receivers)
            if receiver in ready
        }
        errors = [answer for is_good, answer in answers.values() if not is_good]
        if errors:
            raise min(errors, key=lambda timed: timed[0])[1]
        results |= {rank: value for rank, (_, value) in answers.items()}
    return [results[rank] for rank in range(len(receivers))]


def _answer(rank: int, receiver: Connection, process: Any) -> tuple[bool, Any]:
    """What a rank sent: (True, its result) or (False, (when, error))."""
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join(5)
        return False, (0.0, RankError(f"rank {rank} died with exit code {process.exitcode}"))


def _stacks(processes: list[Any], folder: str) -> str:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(Path(folder).glob("stack-*")))


def _work(
    func: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    args: tuple[Any, ...],
    strict: bool,
) -> None:
    if not os.path.isdir(folder):  # who asked for this process was interrupted, and has left
        os._exit(0)
    gc.freeze()  # what the server imported stays: looking through it at every collection would copy it, too
    with open(f"{folder}/stack-of-rank-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        torch.set_num_threads(_threads(world_size))
        if strict:
            warnings.simplefilter("error")
        elif rank:
            warnings.simplefilter("ignore")  # rank 0 says the same
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            meet = f"file://{folder}/meet"
            dist.init_process_group(
                backend, init_method=meet, rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
            )
            sender.send((True, func(*args)))
            dist.barrier()
        except BaseException as error:
            sender.send((False, (time.time(), _sendable(rank, error))))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sender.close()
            multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined] # torch's compiler makes semaphores
            os._exit(0)  # no collective in teardown: a rank that failed must not wait for the others


def _threads(world_size: int) -> int:
    """This rank's share of the cores, unless the user has said how many."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max(1, len(os.sched_getaffinity(0)) // world_size)


def _sendable(rank: int, error: BaseException) -> BigtrainError:
    return error if isinstance(error, BigtrainError) else RankError(f"rank {rank}:\n{traceback.format_exc()}")
