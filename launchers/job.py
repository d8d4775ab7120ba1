"""What runs on the cluster: the supervisor, in the first node of an allocation.

submitit calls it. Its own signal handlers are replaced: they act on one process only, and take any job of ten minutes
or less for one that has timed out.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import runs
from bigtrain.beats import AGAIN
from bigtrain.config.loader import load
from bigtrain.config.schema import Config
from bigtrain.starting import allowed_for
from bigtrain.terminal import print_line
from launchers.plan import LaunchPlan, make_plan
from launchers.profiles import Profile
from launchers.steps import StepStarter, ask
from launchers.supervise import Supervisor, is_finished

# How long the scheduler may take to end a job that was given back to it.
_REQUEUE_S = 60


@dataclass(frozen=True)
class Job:
    """One submitted run: it is pickled, so it holds plain values.

    Attributes:
        run_file: The resolved run file, as it was when the job was submitted.
        attempt: The attempt that was made for it.
        nproc: Processes on each node.
        nodes: How many nodes.
        profile: What was asked of the cluster.
        debug: Show tracebacks of errors that are the user's.
    """

    run_file: str
    attempt: str
    nproc: int
    nodes: int
    profile: Mapping[str, Any]
    debug: bool = False

    def __call__(self) -> None:
        """Supervise the run; ends this process with its exit code, which becomes the job's."""
        config = load(self.run_file).config
        profile = Profile.model_validate(dict(self.profile))
        plan = make_plan(config, Path(self.run_file), [], nproc=self.nproc, nodes=self.nodes, debug=self.debug)
        raise SystemExit(run_in_allocation(config, plan, profile, Path(self.attempt)))


def run_in_allocation(config: Config, plan: LaunchPlan, profile: Profile, made: Path | None = None) -> int:
    """Supervise a run in the allocation that this process is part of.

    Args:
        config: The run file.
        plan: What is started.
        profile: What was asked of the cluster.
        made: The attempt that was made when the job was submitted; it is used once.

    Returns:
        The exit code. After 75 the job has been given back to the scheduler, to be started again under its number.
    """
    for number in (signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR2 else signal.SIG_DFL)
    job = os.environ["SLURM_JOB_ID"]
    os.environ[runs.OWNER_VARIABLE] = f"job {job}"
    if made is not None and is_finished(made) and not allowed_for(config).finished:
        print_line(f"the run is finished: {made.parent.parent}")
        return 0

    def claim() -> Path:
        if made is not None and runs.take(made):
            return made
        runs.check_free(config.run.dir, config.run.name, allowed_for(config))
        return runs.claim(config.run.dir, config.run.name)

    place = {"job": job, "start_of_job": os.environ.get("SLURM_RESTART_COUNT", "0")}
    code = Supervisor(plan, StepStarter(plan, profile), claim, place=place, again=False).run()
    if code == AGAIN:
        print_line(f"the state is saved: giving job {job} back to the scheduler")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        said = ask("scontrol", "requeue", job)
        time.sleep(_REQUEUE_S)  # the scheduler ends this process
        print_line(f"the scheduler did not take the job back {said}: start it again to go on")
    return code
