"""From a run file to a job: what is checked, in which order, and what is left in the run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain import runs
from bigtrain.config.loader import dump
from bigtrain.config.schema import Config
from bigtrain.errors import SetupError
from bigtrain.starting import allowed_for
from launchers.job import Job, run_in_allocation
from launchers.plan import LaunchPlan, make_plan
from launchers.profiles import Profile, load_profile
from launchers.queue import check_no_job, useful_commands
from launchers.slurm import Submission, check, submit
from launchers.snapshot import Snapshot, snapshot


@dataclass(frozen=True)
class Prepared:
    """A run that may be submitted: everything that can be refused has been looked at, and nothing is made.

    Attributes:
        config: The run file.
        plan: What is started.
        profile: What is asked of the cluster.
        path: The run folder.
        code: What will be copied.
    """

    config: Config
    plan: LaunchPlan
    profile: Profile
    path: Path
    code: Snapshot

    @property
    def folder(self) -> Path:
        """Where the submission's files will lie."""
        made = runs.attempts(self.path)
        number = int(made[-1].name) + 1 if made else 0
        return self.path / "attempts" / str(number) / "submit"

    def submission(self) -> Submission:
        """What will be submitted."""
        return Submission(self.config.run.name, self.plan, self.profile, self.folder, self.code)


def prepared(config: Config, run_file: Path, *, debug: bool) -> Prepared:
    """Read the profile, and see what would be submitted.

    Raises:
        UserError: Where something is wrong with it.
    """
    profile = load_profile(config, run_file)
    wanted = config.launch.nproc
    nproc = wanted if isinstance(wanted, int) else profile.gpus_per_node or 1
    plan = make_plan(config, run_file, [], nproc=nproc, debug=debug, threads=profile.cpus_per_task)
    path = Path(config.run.dir, config.run.name).absolute()
    if "%" in str(path):
        raise SetupError(
            f"{path} has a %, with which SLURM's own words in names of files begin",
            where="run.name" if "%" in config.run.name else "run.dir",
            remedy="give a name without it",
        )
    runs.check_free(config.run.dir, config.run.name, allowed_for(config))
    before = Prepared(config, plan, profile, path, Snapshot())
    return Prepared(config, plan, profile, path, snapshot(before.folder, copy=False))


def submit_run(run: Prepared, say: Callable[[str], None]) -> str:
    """Copy the code, submit the job, and say what can be done with it; returns the job's number.

    Raises:
        UserError: Where the cluster refuses it; nothing is left of it then.
    """
    check_no_job(run.path)
    submission = run.submission()
    check(submission)
    attempt = runs.claim(run.config.run.dir, run.config.run.name)
    try:
        if attempt != submission.folder.parent:
            raise SetupError(f"another start of {run.config.run.name} was faster", remedy="try again")
        submission.folder.mkdir()
        copied = snapshot(submission.folder)
        run_file = submission.folder / "run.yaml"
        run_file.write_text(dump(run.config), encoding="utf-8")
        job = Job(str(run_file), str(attempt), run.plan.nproc, run.plan.nodes, run.profile.model_dump(), run.plan.debug)
        number = submit(submission, [job] * submission.allocations)
    except BaseException:
        runs.release(attempt)
        raise
    runs.give_back(attempt)  # nobody holds the run while it waits
    say(f"submitted as job {number}: {submission.words()}\n{copied.words}\n{useful_commands(run.path)}")
    return number


def start_here(run: Prepared, run_file: Path, changes: Sequence[str]) -> int:
    """Supervise the run in the allocation that this process is part of.

    Raises:
        SetupError: Where it is part of none.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise SetupError(
            "this command runs in no allocation",
            where="--in-allocation",
            remedy="run it in a batch script (slurm/batch.sh) or under salloc; without --in-allocation it is submitted",
        )
    plan = make_plan(
        run.config, run_file, changes, nproc=run.plan.nproc, debug=run.plan.debug, threads=run.profile.cpus_per_task
    )
    return run_in_allocation(run.config, plan, run.profile)
