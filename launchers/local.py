"""Ranks on this machine, through torchrun: rank 0 on the terminal, a log for each of the others, and one clear end.

When a rank fails, torchrun ends the others; what it says of that goes to a log of its own, and the cause is printed
last.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from bigtrain.runs import ATTEMPT_VARIABLE, RankFailure, read_errors
from launchers.plan import LaunchPlan, interpreter

# After the first rank has failed, the others get this long to end by themselves, and everything has ended 10 seconds
# after it.
_GRACE_SECONDS = 4
_LIMIT_SECONDS = 7.0

_AGENT_FAILED = re.compile(rb"^E\d{4} .*torch/distributed/elastic")
_AGENT_SPEAKS = re.compile(rb"^[EWI]\d{4} .*torch/distributed/")
_EXIT_OF_RANK = re.compile(r"rank\s+: (\d+) \(local_rank.*?exitcode\s+: (-?\d+)", re.DOTALL)


def run(plan: LaunchPlan, attempt: Path) -> int:
    """Start the ranks, wait for them, and say why it ended if it ended badly.

    Args:
        plan: What to start.
        attempt: The attempt's part of the run folder: logs and errors go there.

    Returns:
        The exit code: 0, that of the rank that failed first, or 128 + N after signal N.
    """
    log = attempt / "logs" / "torchrun.log"
    environment = {
        **os.environ,
        **plan.environment,
        ATTEMPT_VARIABLE: str(attempt),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_GRACE_SECONDS),
        "PYTHONUNBUFFERED": "1",
    }
    command = _torchrun(plan, attempt)
    print(f"starting {plan.nproc} process{'es' if plan.nproc > 1 else ''}; logs are in {attempt / 'logs'}", flush=True)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    pump = threading.Thread(target=_pass_on, args=(process.stderr, log), daemon=True)
    pump.start()
    with _Interrupt(process) as interrupt:
        code = _wait(process, attempt)
    pump.join(timeout=2)
    _name_logs(attempt)
    if interrupt.number is not None:
        return 128 + interrupt.number
    return 0 if code == 0 else _explain(attempt, log, code, debug=plan.debug)


def _torchrun(plan: LaunchPlan, attempt: Path) -> list[str]:
    others = ",".join(f"{rank}:3" for rank in range(1, plan.nproc))
    redirects = ["--redirects", others] if others else []
    return [
        interpreter(),
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={plan.nproc}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        f"--log-dir={attempt / 'logs' / '.torchrun'}",
        *redirects,
        "-m",
        *plan.program,
    ]


def _pass_on(stream: IO[bytes], log: Path) -> None:
    """Copy what rank 0 writes to stderr to the terminal and its log, and what torchrun says to a log of its own."""
    failed = False
    with log.open("wb") as agents, log.with_name("rank-00000.stderr").open("wb") as ranks:
        for line in stream:
            failed = failed or bool(_AGENT_FAILED.match(line))
            is_agents = failed or bool(_AGENT_SPEAKS.match(line))
            for target in (agents,) if is_agents else (ranks, sys.stderr.buffer):
                target.write(line)
                target.flush()


class _Interrupt:
    """What SIGINT and SIGTERM do while ranks run: the first lets them stop at a step boundary, a second ends them.

    torchrun itself must not see the signal: it would give the ranks a few seconds and call it a failure. So it runs in
    a session of its own, and the ranks are told directly.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.number: int | None = None

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.number is not None:
            _end(self._process.pid)
            return
        self.number = number
        for rank in children(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], attempt: Path) -> int:
    """Wait for torchrun; some seconds after a rank has left word of its failure, end everything that is left."""
    failed_at: float | None = None
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if failed_at is None and any((attempt / "errors").glob("rank-*.json")):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _LIMIT_SECONDS:
                _end(process.pid)


def children(pid: int) -> list[int]:
    """The processes that a process started; empty where the system has no /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _end(pid: int) -> None:
    """Kill a process and everything below it, the lowest first."""
    for child in children(pid):
        _end(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _name_logs(attempt: Path) -> None:
    """Give the logs of the ranks names that say what they are."""
    logs = attempt / "logs"
    for stream in logs.glob(".torchrun/*/attempt_0/*/*.log"):
        target = logs / f"rank-{int(stream.parent.name):05d}.{stream.stem}"
        if stream.stat().st_size:
            stream.replace(target)
    shutil.rmtree(logs / ".torchrun", ignore_errors=True)


def _explain(attempt: Path, log: Path, code: int, *, debug: bool) -> int:
    """Print the cause of the end, last on the screen, and return its exit code."""
    failures = read_errors(attempt)
    killed = _killed_ranks(log)
    sys.stdout.flush()
    if killed:
        rank, number = killed[0]
        print(
            f"\nerror: rank {rank} was ended by {signal.Signals(number).name}\n"
            f"  at: {attempt / 'logs'}\n"
            f"  do: {_advice(number)}",
            file=sys.stderr,
        )
        return 128 + number
    if failures:
        print("\n" + _tell(failures[0], debug=debug), file=sys.stderr)
        return failures[0].exit_code
    print(f"\nerror: torchrun ended with exit code {code}\n  at: {log}", file=sys.stderr)
    return code if code > 0 else 1


def _killed_ranks(log: Path) -> list[tuple[int, int]]:
    """Ranks that a signal ended, other than the one torchrun ends the rest with."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = [(int(rank), -int(code)) for rank, code in _EXIT_OF_RANK.findall(text)]
    return [(rank, number) for rank, number in found if number > 0 and number not in (signal.SIGTERM, signal.SIGINT)]


def _advice(number: int) -> str:
    if number == signal.SIGKILL:
        return (
            "if nobody killed it, the machine ran out of memory: see the kernel's log, and lower train.micro_batch_size"
        )
    return "a library crashed in native code; see that rank's log"


def _tell(failure: RankFailure, *, debug: bool) -> str:
    """A failure in a few lines: an error of ours without the traceback unless it is asked for, any other with it."""
    place = f"rank {failure.rank}" + (
        f", after step {failure.step}" if failure.step is not None else ", before the first step"
    )
    if failure.exit_code == 1 and failure.remedy is None:
        return f"{failure.traceback.rstrip()}\nerror: {place}: {failure.type}: {failure.message}"
    lines = [f"error: {failure.message}", f"  at: {place}" + (f"; {failure.where}" if failure.where else "")]
    if failure.remedy:
        lines.append("  do: " + failure.remedy.replace("\n", "\n      "))
    return "\n".join([failure.traceback.rstrip(), *lines] if debug else lines)
