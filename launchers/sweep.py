"""A sweep on a cluster: one array of jobs, each task of which is a run with a folder of its own, supervised like any.

A task is requeued alone under its own number, so preemption and the time limit do to it what they do to any run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bigtrain import runs
from bigtrain.config.loader import dump
from bigtrain.errors import BigtrainError, CombinationError
from bigtrain.runs import write_atomically
from launchers.allocate import Prepared
from launchers.follow import Standing, standing
from launchers.job import Job
from launchers.queue import JOB_NOTE, check_no_job
from launchers.slurm import Submission, check, submit
from launchers.snapshot import snapshot

FOLDER = ".sweeps"
"""Beside the runs, none of which can be called so: what arrays of jobs are submitted with, and their output."""

_LOOK_S, _LOOK_A_RUN_S = 1.0, 0.1


def submission_of(prepared: Sequence[Prepared], name: str, parallel: int) -> Submission:
    """The array that holds these runs, in the next folder of its name.

    Args:
        prepared: The runs.
        name: What the array is called.
        parallel: How many of them may run at once.

    Raises:
        CombinationError: Where they do not all ask for the same.
    """
    first = prepared[0]
    for run in prepared:
        if run.profile != first.profile or (run.plan.nproc, run.plan.nodes) != (first.plan.nproc, first.plan.nodes):
            raise CombinationError(
                f"{run.path.name} asks the cluster for other things than {first.path.name}",
                where="launch",
                remedy="the runs of one sweep are one array, and ask for the same: begin one sweep for each",
            )
    if first.profile.array:
        raise CombinationError(
            f"the profile asks for {first.profile.array} allocations of each run, one after the other",
            where="launch.slurm.array",
            remedy="take it out: the array is the sweep's own, and what is not finished is requeued",
        )
    place = first.path.parent / FOLDER
    number = next(number for number in range(10**6) if not (place / f"{name}-{number}").exists())
    folder = place / f"{name}-{number}"
    code = snapshot(folder, copy=False)
    return Submission(name, first.plan, first.profile, folder, code, tasks=len(prepared), parallel=parallel)


def submit_sweep(prepared: Sequence[Prepared], name: str, parallel: int, say: Callable[[str], None]) -> str:
    """Copy the code once, submit the array, and note in each run's folder which task it is.

    Raises:
        UserError: Where the cluster refuses it, or a run is a job already; nothing is left of it then.
    """
    for run in prepared:
        check_no_job(run.path)
    submission = submission_of(prepared, name, parallel)
    check(submission)
    made: list[Path] = []
    try:
        submission.folder.mkdir(parents=True)
        copied = snapshot(submission.folder)
        jobs = [_job(run, made) for run in prepared]
        number = submit(submission, jobs)
        for index, attempt in enumerate(made):
            note = {"job": f"{number}_{index}" if len(jobs) > 1 else number, "name": name}
            write_atomically(attempt / "submit" / JOB_NOTE, json.dumps(note) + "\n")
    except BaseException:
        for attempt in made:
            runs.release(attempt)
        shutil.rmtree(submission.folder, ignore_errors=True)
        with suppress(OSError):  # of another sweep, too
            submission.folder.parent.rmdir()
        raise
    for attempt in made:
        runs.give_back(attempt)  # nobody holds the runs while they wait
    say(f"submitted as job {number}: {submission.words()}\n{copied.words}")
    return number


def _job(run: Prepared, made: list[Path]) -> Job:
    """Claim a run, and leave in it what its task needs."""
    attempt = runs.claim(run.config.run.dir, run.config.run.name)
    made.append(attempt)
    folder = attempt / "submit"
    folder.mkdir()
    run_file = folder / "run.yaml"
    run_file.write_text(dump(run.config), encoding="utf-8")
    return Job(str(run_file), str(attempt), run.plan.nproc, run.plan.nodes, run.profile.model_dump(), run.plan.debug)


def wait_for(paths: Sequence[Path], say: Callable[[str], None]) -> list[Path]:
    """Say how runs stand whenever that changes, until all are over; returns those that did not finish.

    Ctrl-C ends the waiting alone.
    """
    told: dict[Path, str] = {}
    while True:
        found = {path: standing(path) for path in paths}
        for path, stands in found.items():
            words = _words(stands)
            if told.get(path) != words:
                told[path] = words
                say(f"{path.name}: {words}")
        if all(stands.is_over for stands in found.values()):
            return [path for path, stands in found.items() if stands.state != "finished"]
        time.sleep(max(_LOOK_S, _LOOK_A_RUN_S * len(paths)))


def is_queued(path: Path) -> bool:
    """Whether a run is a job that waits or runs, by its folder."""
    try:
        check_no_job(path)
    except BigtrainError:
        return True
    return False


def _words(stands: Standing) -> str:
    return stands.state + (f" ({stands.cause or stands.where})" if stands.cause or stands.where else "")
