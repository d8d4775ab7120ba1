"""What the scheduler says of a job."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import RunFolderError
from bigtrain.runs import attempts, read_json
from launchers.steps import ask

JOB_NOTE = "job.json"

_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job stands.

    Attributes:
        number: The job.
        state: The scheduler's word, as PENDING or RUNNING.
        reason: Why it waits, or where it runs.
    """

    number: str
    state: str
    reason: str

    @property
    def is_waiting(self) -> bool:
        """Whether it has not started yet, or not started again."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")


def job_of(path: Path) -> str | None:
    """The job that a run was submitted as last, if its newest start is one of that job's."""
    for attempt in reversed(attempts(path)):
        start = read_json(attempt / "start.json")
        job = start.get("job") or read_json(attempt / "submit" / JOB_NOTE).get("job")
        if job or start:
            return str(job) if job else None
    return None


def state_of(job: str) -> JobState | None:
    """How a job stands; None where the scheduler does not know it (any more)."""
    lines = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%R").splitlines()
    if not lines:
        return None
    state, _, reason = lines[0].partition("|")
    return (
        None if state in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL") else JobState(job, state, reason)
    )


def check_no_job(path: Path) -> None:
    """See that a run is not a job already: one that waits, or has begun and not yet taken the run.

    Raises:
        RunFolderError: Where it is, with its job.
    """
    number = job_of(path)
    job = state_of(number) if number else None
    if job is not None and job.state != "COMPLETING" and job.number != os.environ.get("SLURM_JOB_ID"):
        raise RunFolderError(
            f"the run {path.name} is job {job.number} already, {job.state.lower()} {job.reason}",
            where=str(path),
            remedy=f"bigtrain runs stop {path.name} ends it; or set run.name to another name",
        )


def useful_commands(path: Path) -> str:
    """What can be done with a run that was started, for the user to copy."""
    name = shlex.quote(path.name if path.parent.name == "runs" else str(path))
    rows = [
        (f"bigtrain runs logs {name} -f", "follow it"),
        (f"bigtrain runs show {name}", "how it stands"),
        (f"bigtrain runs stop {name}", "save and leave"),
        (f"bigtrain runs resume {name}", "go on after that"),
    ]
    width = max(len(command) for command, _ in rows)
    return "\n".join(f"  {command:<{width}}   {what}" for command, what in rows)
