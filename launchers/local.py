"""Ranks on this machine, through torchrun: rank 0 on the terminal, a log for each of the others.

torchrun starts them and ends them all when one fails; it restarts nothing. That is the supervisor's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launchers.plan import LaunchPlan, interpreter
from launchers.starting import Agent, RankEnd, Ranks, children

# After the first rank has failed, torchrun asks the others to end, and kills them after this long.
_GRACE_SECONDS = 2

_LIMITS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_GRACE_SECONDS)}

_AGENT_FAILED = re.compile(rb"^E\d{4} .*torch/distributed/elastic")
_AGENT_SPEAKS = re.compile(rb"^[EWI]\d{4} .*torch/distributed/")
_EXIT_OF_RANK = re.compile(r"rank\s+: (\d+) \(local_rank.*?exitcode\s+: (-?\d+)", re.DOTALL)


class LocalStarter:
    """Starts the processes of a plan on this machine."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan

    def address(self) -> str:
        """Loopback: nobody else has to find it."""
        return "127.0.0.1"

    def shown(self) -> str:
        """What would be started, as a person would type it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(self._plan.environment.items())]
        return " ".join([*words, shlex.join(_command(self._plan, Path("ATTEMPT")))])

    def start(self, attempt: Path, environment: Mapping[str, str]) -> Ranks:
        """Start torchrun; see `Starter`."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return _Torchrun(_command(self._plan, attempt), {**inherited, **environment, **_LIMITS}, attempt)


def _command(plan: LaunchPlan, attempt: Path) -> list[str]:
    return [
        interpreter(),
        "-m",
        "launchers.guarded",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={plan.nproc}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        f"--log-dir={_scratch(attempt)}",
        "-m",
        "launchers.guarded",
        *plan.program,
    ]


def _scratch(attempt: Path) -> Path:
    """Where torchrun keeps files that nobody reads."""
    return attempt / "logs" / ".torchrun"


class _Torchrun:
    def __init__(self, command: list[str], environment: Mapping[str, str], attempt: Path) -> None:
        self._attempt = attempt
        self._asked: set[int] = set()
        log = attempt / "logs" / "torchrun.log"
        self._agent = Agent(command, environment, log, speaks=_AGENT_SPEAKS, failed=_AGENT_FAILED)

    def poll(self) -> int | None:
        return self._agent.poll()

    def signal(self, number: int) -> None:
        # torchrun itself must not see it: it would give the ranks a few seconds and call it a failure.
        for rank in children(self._agent.process.pid):
            with suppress(ProcessLookupError):
                os.kill(rank, number)

    def stop(self) -> None:
        for rank in set(children(self._agent.process.pid)) - self._asked:
            self._asked.add(rank)
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)

    def kill(self) -> None:
        self._agent.kill()

    def ends(self) -> list[RankEnd]:
        found = [RankEnd(int(rank), int(code)) for rank, code in _EXIT_OF_RANK.findall(self._agent.said())]
        # With these torchrun ends the others.
        return [end for end in found if end.code not in (-signal.SIGTERM, -signal.SIGINT)]

    def close(self) -> None:
        self._agent.close()
        shutil.rmtree(_scratch(self._attempt), ignore_errors=True)
