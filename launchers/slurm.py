"""Submitting a run to SLURM, through submitit: what is submitted is the supervisor, which starts ranks with srun.

What would be submitted is a pure function of plan and profile; `submit` hands exactly that to submitit.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.errors import CombinationError, SetupError
from bigtrain.runs import write_atomically
from bigtrain.sources import CODE_VARIABLE
from launchers.job import Job
from launchers.plan import LaunchPlan, interpreter
from launchers.profiles import Profile
from launchers.queue import JOB_NOTE
from launchers.snapshot import Snapshot

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Submission:
    """What is asked of the scheduler.

    Attributes:
        name: The job's name.
        plan: What the job starts.
        profile: What is asked for.
        folder: Where the scheduler's and submitit's files go: attempts/<n>/submit in the run folder.
        code: The code that the job runs.
        tasks: How many runs the job is an array of.
        parallel: How many of its tasks may run at once.
    """

    name: str
    plan: LaunchPlan
    profile: Profile
    folder: Path
    code: Snapshot = field(default_factory=Snapshot)
    tasks: int = 1
    parallel: int = 1

    @property
    def allocations(self) -> int:
        """How many the job asks for."""
        return self.tasks * (self.profile.array or 1)

    def parameters(self) -> dict[str, Any]:
        """What submitit is told."""
        profile = self.profile
        direct = {
            name: value
            for name in ("partition", "account", "qos", "gpus_per_node", "cpus_per_task", "mem", "mem_per_gpu",
                         "constraint", "exclude", "nodelist", "comment", "mail_type", "mail_user")
            if (value := getattr(profile, name)) is not None
        }  # fmt: skip
        further = {"requeue": True} if profile.requeue else {"no-requeue": True}
        if profile.reservation is not None:
            further["reservation"] = profile.reservation  # type: ignore[assignment]
        return {
            "job_name": self.name,
            "nodes": self.plan.nodes,
            "ntasks_per_node": self.plan.nproc,
            "time": profile.minutes,
            "signal_delay_s": profile.signal_s,
            "use_srun": False,  # the job is the supervisor alone, and it starts the ranks
            "stderr_to_stdout": True,
            "wckey": "bigtrain",
            "array_parallelism": self.parallel,
            **({"exclusive": True} if profile.exclusive else {}),
            **direct,
            "setup": self._setup(),
            "additional_parameters": {**further, **_raw(profile.sbatch)},
        }

    def text(self) -> str:
        """The batch script, byte for byte as it is submitted."""
        slurm = _library()
        count = self.allocations if self.allocations > 1 else None
        command = f"{shlex.quote(interpreter())} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        return str(slurm._make_sbatch_string(command=command, folder=self.folder, map_count=count, **self.parameters()))

    def words(self) -> str:
        """The resources in a line of plain words."""
        plan, profile = self.plan, self.profile
        minutes = profile.minutes
        lasts = f"{minutes / 60:.3g} h" if minutes >= 60 else f"{minutes} min"
        units, per_node = ("GPU", profile.gpus_per_node) if profile.gpus_per_node else ("core", self._cores())
        nodes = f"{plan.nodes} node{'s' if plan.nodes > 1 else ''}"
        many = f" × {profile.array} allocations, one after the other" if profile.array else ""
        many += f" × {self.tasks} runs, {self.parallel} at a time" if self.tasks > 1 else ""
        total = plan.nodes * per_node * minutes / 60 * self.allocations
        most = f"{total:,.0f}" if total >= 10 else f"{total:.3g}"
        return (
            f"{nodes} × {per_node} {units}{'s' if per_node > 1 else ''}, {plan.num_processes} "
            f"process{'es' if plan.num_processes > 1 else ''}, {lasts}{many}, {most} {units}-hours at most"
            + (" before it is requeued" if profile.requeue and not profile.array else "")
        )

    def _cores(self) -> int:
        return self.plan.nproc * (self.profile.cpus_per_task or 1)

    def _setup(self) -> list[str]:
        lines = list(self.profile.setup)
        if self.code.path:
            path = shlex.quote(":".join(map(str, self.code.path)))
            lines += [
                f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
                "export PYTHONSAFEPATH=1  # the code that was submitted, not what lies in the current directory now",
            ]
        if self.code.here is not None:
            lines.append(f"export {CODE_VARIABLE}={shlex.quote(str(self.code.here))}")
        return lines


def check(submission: Submission) -> None:
    """See whether the cluster would take it, before anything is made.

    Raises:
        SetupError: Where there is no SLURM here, or it refuses.
        CombinationError: Where a node is to run more processes than it has GPUs.
    """
    plan, gpus = submission.plan, submission.profile.gpus_per_node
    if gpus is not None and plan.nproc > gpus:
        raise CombinationError(
            f"{plan.nproc} processes are to run on each node, which has {gpus} GPUs in the profile",
            where="launch.nproc",
            remedy=f"set launch.nproc={gpus}, or gpus_per_node in the profile",
        )
    if shutil.which("sbatch") is None:
        raise SetupError(
            "there is no SLURM on this machine: the command sbatch is not found",
            where="launch.target",
            remedy="run it on a login node of the cluster; --dry-run shows here what would be submitted",
        )
    done = subprocess.run(
        ["sbatch", "--test-only"], input=submission.text(), capture_output=True, text=True, timeout=_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines() if line)
        raise SetupError(
            f"the cluster refuses the job: {said or done.stdout.strip()}",
            where="launch.profile",
            remedy="`sinfo` shows partitions, nodes and what they have; change the profile, or launch.slurm.KEY=VALUE",
        )


def submit(submission: Submission, jobs: Sequence[Job]) -> str:
    """Submit one job, or an array of several, and note its number in the submission's folder.

    Raises:
        SetupError: Where the scheduler refuses it.
    """
    _library()
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=submission.folder)
    executor.update_parameters(**submission.parameters())
    try:
        first = executor.submit_array(list(jobs))[0] if len(jobs) > 1 else executor.submit(jobs[0])
    except (FailedJobError, FailedSubmissionError) as error:
        raise SetupError(f"the cluster refuses the job: {error}", where="launch.profile") from error
    number = str(first.job_id).partition("_")[0]
    write_atomically(submission.folder / JOB_NOTE, json.dumps({"job": number, "name": submission.name}) + "\n")
    return number


def _library() -> Any:
    """What submitit knows of SLURM.

    Raises:
        SetupError: Where it is not installed.
    """
    try:
        from submitit.slurm import slurm
    except ModuleNotFoundError:
        raise SetupError("submitit is not installed", remedy='pip install "bigtrain[slurm]"') from None
    return slurm


def _raw(options: Sequence[str]) -> dict[str, Any]:
    """Options as they stand after #SBATCH, for submitit."""
    found: dict[str, Any] = {}
    for option in options:
        name, has_value, value = option.removeprefix("#SBATCH").strip().partition("=")
        if not name.startswith("--") or " " in name:
            raise SetupError(
                f"{option!r} is no option of sbatch", where="sbatch", remedy="write it as --name or --name=value"
            )
        found[name.removeprefix("--")] = value if has_value else True
    return found
