"""Ranks in an allocation: one step of it for each attempt, with a task for each process.

What differs from this machine alone is the command that starts them, how signals reach them, and that the scheduler's
variables say which rank a task is.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from launchers.guarded import SHARED_LOG_VARIABLE, STEP_VARIABLE
from launchers.plan import LaunchPlan, interpreter
from launchers.profiles import Profile
from launchers.starting import Agent, RankEnd, Ranks

# Above this many ranks a machine has one log, its lines prefixed with the rank.
MOST_LOGS = 64
_COMMAND_TIMEOUT_S = 20
# How long a step that was killed may take to be gone.
_END_S = 10.0
_LOOK_S = 0.2

_SPEAKS = re.compile(rb"^(srun|slurmstepd)[:\-]")
_END = re.compile(r"^srun: error: \S+ tasks? (?P<ranks>[\d,-]+): (?P<how>.*)$", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")
# What srun says of a task that a signal ended. With the two that are missing, ranks are asked to leave.
_ASKING = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals() if number not in _ASKING}
_SIGNALS["Out Of Memory"] = signal.SIGKILL


class StepStarter:
    """Starts the processes of a plan in the allocation that this process is part of.

    Args:
        plan: What is started.
        profile: What was asked of the cluster.
    """

    def __init__(self, plan: LaunchPlan, profile: Profile) -> None:
        self._plan, self._profile = plan, profile

    def address(self) -> str:
        """The address by which this machine, the first of the allocation, is known to the scheduler."""
        host = socket.gethostname()
        name = os.environ.get("SLURMD_NODENAME", host)
        found = re.search(r"NodeAddr=(\S+)", ask("scontrol", "show", "node", name))
        return socket.gethostbyname(found[1] if found else host)

    def start(self, attempt: Path, environment: Mapping[str, str]) -> Ranks:
        """Start a step; see `Starter`."""
        plan, name = self._plan, f"bigtrain-{attempt.name}"
        address = self.address()
        ours = {
            **self._profile.environment,
            **environment,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(_free_port(address)),
            STEP_VARIABLE: "1",
        }
        if plan.num_processes > MOST_LOGS:
            ours[SHARED_LOG_VARIABLE] = "1"
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        command = step_command(plan, self._profile, attempt, name)
        return _Step(command, {**inherited, **ours}, attempt / "logs" / "srun.log", name)

    def close(self) -> None:
        """Nothing is kept from one step for the next."""


def step_command(plan: LaunchPlan, profile: Profile, attempt: Path, name: str) -> list[str]:
    """The command that starts one attempt's ranks; a pure function."""
    logs = ["--label", f"--output={attempt / 'logs'}/node-%5n.log"] if plan.num_processes > MOST_LOGS else []
    container = profile.container
    python, before, of_container = interpreter(), list[str](), list[str]()
    if container is not None:
        python = container.python
        if container.runtime == "pyxis":
            of_container = [f"--container-image={container.image}"]
            of_container += [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        else:
            before = [*container.runtime.split(), *(f"--bind={mount}" for mount in container.mounts), container.image]
    return [
        "srun",
        f"--job-name={name}",
        f"--nodes={plan.nodes}",
        f"--ntasks={plan.num_processes}",
        f"--ntasks-per-node={plan.nproc}",
        *([f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []),
        # Rank r is on the node r // nproc, and rank 0 beside the supervisor.
        "--distribution=block",
        # Who failed first is to be told, and the others get a moment to say what they saw: the supervisor ends them.
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--unbuffered",
        "--mpi=none",
        *logs,
        *of_container,
        *profile.srun,
        *before,
        python,
        "-m",
        "launchers.guarded",
        *plan.program,
    ]


class _Step:
    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, name: str) -> None:
        self._name, self._job = name, os.environ["SLURM_JOB_ID"]
        self._number: str | None = None
        self._was_asked = False
        self._said: str | None = None
        self._agent = Agent(command, environment, log, speaks=_SPEAKS)

    def poll(self) -> int | None:
        return self._agent.poll()

    def signal(self, number: int) -> None:
        self._send(signal.Signals(number).name.removeprefix("SIG"))

    def stop(self, number: int) -> None:
        # The scheduler tells the ranks itself when it ends the job; when only the supervisor was told, we do.
        self._was_asked = self._was_asked or self._send(signal.Signals(number).name.removeprefix("SIG"))

    def kill(self) -> None:
        self._said = self._heard()  # what is said from now on is our own doing
        self._send("KILL")

    def ends(self) -> list[RankEnd]:
        return read_ends(self._heard())

    def is_silent_about(self, rank: int) -> bool:
        return not any(rank in expand(match["ranks"]) for match in _END.finditer(self._heard()))

    def _heard(self) -> str:
        return self._agent.said() if self._said is None else self._said

    def close(self) -> None:
        """The step may have outlived what started it, and the next one must find its place free."""
        deadline = time.monotonic() + _END_S
        while self._find() is not None and time.monotonic() < deadline:
            self._send("KILL")
            time.sleep(_LOOK_S)
        self._agent.kill()
        self._agent.close()

    def _send(self, name: str) -> bool:
        """Send a signal to every task; False where the step is not there (yet)."""
        step = self._number or self._find()
        if step is not None:
            ask("scancel", f"--signal={name}", step)
        return step is not None

    def _find(self) -> str | None:
        """The step's number, while there is such a step."""
        listed = ask("squeue", "-h", "-s", "-j", self._job, "-o", "%j %i").splitlines()
        found = dict(line.split() for line in listed).get(self._name)
        self._number = found or self._number
        return found


def read_ends(text: str) -> list[RankEnd]:
    """How tasks ended badly, by what srun said, in its order."""
    found = []
    for match in _END.finditer(text):
        how = match["how"].removesuffix(" (core dumped)")
        exited = _EXITED.fullmatch(how)
        code = int(exited[1]) if exited else -_SIGNALS[how] if how in _SIGNALS else None
        found += [RankEnd(rank, code) for rank in expand(match["ranks"]) if code is not None]
    return found


def expand(ranks: str) -> list[int]:
    """The numbers in a list like 0-2,5."""
    spans = [part.partition("-") for part in ranks.split(",")]
    return [number for low, _, high in spans for number in range(int(low), int(high or low) + 1)]


def ask(*command: str) -> str:
    """What one of the scheduler's commands prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _free_port(address: str) -> int:
    with socket.socket() as held:
        held.bind((address, 0))
        return int(held.getsockname()[1])
