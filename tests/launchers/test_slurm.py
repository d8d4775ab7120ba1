"""Runs on a real SLURM of two nodes: its daemons, its signals, its queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from bigtrain.runs import read_json
from bigtrain.tracking import wandb_files
from tests.helpers import launching
from tests.helpers.launching import begin, bigtrain, last_step, left_over, numbers, ranks_of, run_file, until
from tests.helpers.slurm import Cluster

pytestmark = pytest.mark.slow

PROFILE = {"partition": "low", "time": "00:05:00", "cpus_per_task": 1, "exclusive": True, "signal_s": 60}


def profile(folder: Path, **changes: object) -> str:
    (folder / "low.yaml").write_text(yaml.safe_dump({**PROFILE, **changes}))
    return "--profile=low.yaml"


def submit(cluster: Cluster, folder: Path, path: Path, *arguments: str) -> str:
    done = bigtrain(folder, "launch", str(path), "--target=slurm", profile(folder), "--nodes=2", "--detach", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("submitted as job ")[1].split(":")[0]


def preempt(cluster: Cluster) -> str:
    """A job that takes both nodes away for a moment."""
    script = "#!/bin/bash\nsleep 1\n"
    command = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def trains_on(path: Path) -> None:
    """Wait until a run has taken some steps from where it is now."""
    seen = last_step(path)
    until(lambda: last_step(path) > seen + 5, 90, "the training")


def attempts(path: Path) -> list[str]:
    """How each start of a run ended."""
    made = sorted((path / "attempts").iterdir(), key=lambda entry: int(entry.name))
    return [read_json(entry / "end.json").get("outcome", "-") for entry in made]


def test_preempted_twice_out_of_time_once_and_a_rank_killed(cluster: Cluster, tmp_path: Path) -> None:
    """Whatever a cluster does to a run, its numbers are those of the unbroken one."""
    steps = {"train": {"steps": 300, "micro_batch_size": 2}}
    whole = bigtrain(tmp_path, "launch", str(run_file(tmp_path, "whole", plant=True, **steps)), "--nproc=2")
    assert whole.returncode == 0, whole.stderr
    path = tmp_path / "runs/broken"
    (tmp_path / "slowly").touch()
    track = {"log_every": 1, "progress": "plain", "wandb": "offline"}
    job = submit(cluster, tmp_path, run_file(tmp_path, "broken", plant=True, track=track, **steps))

    for _ in range(2):
        trains_on(path)
        preempt(cluster)
        until(lambda: cluster.state(job) != "RUNNING", 30, "the preemption")
    trains_on(path)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=1", check=True)  # less than signal_s from now
    until(lambda: cluster.job(job).get("Restarts") == "3", 60, "the requeueing at the time limit")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=5", check=True)
    trains_on(path)
    (rank, *_) = ranks_of(path / "attempts/0/submit/run.yaml")
    os.kill(rank, signal.SIGKILL)
    (tmp_path / "slowly").unlink()
    assert cluster.until_state(job, "COMPLETED", "FAILED", timeout_s=120) == "COMPLETED"

    assert attempts(path) == ["again", "again", "again", "failed", "finished"]
    assert cluster.job(job)["Restarts"] == "3"  # the dead rank cost no place in the queue
    assert numbers(path) == numbers(tmp_path / "runs/whole")
    done = bigtrain(tmp_path, "runs", "show", "broken")
    assert "was ended by SIGKILL" in done.stdout
    assert_one_run_at_wandb(path, starts=5)


def assert_one_run_at_wandb(path: Path, starts: int) -> None:
    """What five starts left to be sent is one run: every step once, with the number that the run folder has."""
    run_id = (path / "wandb_id").read_text().strip()
    folders = sorted((path / "wandb").glob("offline-run-*"))
    assert len(folders) == starts
    assert {folder.name.rpartition("-")[2] for folder in folders} == {run_id}
    rows = [row for log in wandb_files.logs(path, run_id) for row in wandb_files.history(log)]
    sent = [(int(row["train/step"]), float(row["train/loss"])) for row in rows if "train/loss" in row]
    losses = [(row["step"], row["loss"]) for row in numbers(path) if "loss" in row]
    assert [step for step, _ in sent] == [step for step, _ in losses] == list(range(1, 301))
    assert [loss for _, loss in sent] == pytest.approx([loss for _, loss in losses], rel=1e-12)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "runs/it"
    job = submit(cluster, tmp_path, run_file(tmp_path, train={"steps": 100_000}, checkpoint={"every_steps": None}))
    until(lambda: last_step(path) > 5, 60, "the training")
    cluster.call("scancel", job)
    until(lambda: attempts(path)[-1] != "-", 20, "the end")
    assert attempts(path) == ["stopped"]
    assert len(list((path / "checkpoints").glob("step-*/manifest.json"))) == 1
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    assert not left_over(str(tmp_path))


def test_an_error_in_code_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    path = run_file(tmp_path, plant=True)
    (tmp_path / "planted/raises").write_text("1")
    job = submit(cluster, tmp_path, path)
    assert cluster.until_state(job, "FAILED", "COMPLETED", timeout_s=60) == "FAILED"
    assert attempts(tmp_path / "runs/it") == ["failed"]
    (log,) = (tmp_path / "runs/it/attempts/0/submit").glob("*.out")
    assert log.read_text().rstrip().splitlines()[-1] == "error: rank 1, after step 7: ZeroDivisionError: planted"


def test_a_rank_that_leaves_before_the_runs_end_is_the_cause(cluster: Cluster, tmp_path: Path) -> None:
    """The scheduler says nothing of a task that ended with 0, and the others fail of it."""
    path = run_file(tmp_path, plant=True, launch={"max_restarts": 0})
    (tmp_path / "planted/leaves").write_text("1")
    job = submit(cluster, tmp_path, path)
    assert cluster.until_state(job, "FAILED", "COMPLETED", timeout_s=60) == "FAILED"
    end = read_json(tmp_path / "runs/it/attempts/0/end.json")
    assert (end["cause"], end["rank"]) == ("rank 1 is gone before the run was done, and left no word", 1)


def test_a_signal_to_one_rank_in_the_middle_of_a_save(cluster: Cluster, tmp_path: Path) -> None:
    """Saving all the time, a signal always comes in the middle of one; a second one comes a second later."""
    run = tmp_path / "runs/it"
    path = run_file(tmp_path, train={"steps": 100_000}, checkpoint={"every_steps": 1, "background": False})
    job = submit(cluster, tmp_path, path)
    until(lambda: last_step(run) > 5, 60, "the training")
    os.kill(ranks_of(run / "attempts/0/submit/run.yaml")[1], signal.SIGUSR2)
    time.sleep(1)
    for pid in ranks_of(run / "attempts/0/submit/run.yaml"):
        os.kill(pid, signal.SIGUSR2)
    until(lambda: cluster.job(job).get("Restarts") == "1", 30, "the requeueing")
    saved = [entry for entry in (run / "checkpoints").iterdir() if not (entry / "manifest.json").exists()]
    assert not saved
    bigtrain(tmp_path, "runs", "stop", "it")
    until(lambda: cluster.state(job) in ("CANCELLED", "FAILED", "COMPLETED"), 60, "the end")


def test_a_node_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    """Its daemon and its ranks are gone at once: SLURM requeues the job, and the run goes on from what it had saved."""
    run = tmp_path / "runs/it"
    (tmp_path / "slowly").touch()
    job = submit(cluster, tmp_path, run_file(tmp_path, plant=True))
    until(lambda: last_step(run) > 6, 60, "the training")
    cluster.kill_node("n2")
    (tmp_path / "slowly").unlink()
    try:
        until(lambda: cluster.job(job).get("Restarts") == "1", 90, "the requeueing")
    finally:
        cluster.start_node("n2")
        cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    assert cluster.until_state(job, "COMPLETED", "FAILED", timeout_s=120) == "COMPLETED"
    assert last_step(run) == 40
    assert read_json(run / "attempts/0/start.json")["job"] == job


def test_what_is_shown_is_what_is_submitted(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = uuid.uuid4().hex
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, secret)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("runs/\nignored.txt\n")
    (tmp_path / "ignored.txt").write_text("left out")
    path = run_file(tmp_path, plant=True)
    arguments = ["launch", str(path), "--target=slurm", profile(tmp_path), "--nodes=2"]
    shown = bigtrain(tmp_path, *arguments, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == "2 nodes × 1 core, 2 processes, 5 min, 0.167 core-hours at most before it is requeued\n"
    assert not (tmp_path / "runs").exists()

    job = submit(cluster, tmp_path, path, "train.steps=3")
    folder = tmp_path / "runs/it/attempts/0/submit"
    held = subprocess.run(["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True, check=True)
    assert held.stdout.rstrip("\n") == shown.stdout.rstrip("\n")
    assert (folder / f"{job}_submission.sh").read_text() == shown.stdout
    # The job runs the copy: what lies here now does not matter any more.
    (tmp_path / "planting.py").write_text(
        "class Planted:\n    def __init__(self, **args): ...\n\nraise SystemExit('changed after the submission')\n"
    )
    again = bigtrain(tmp_path, *arguments)
    assert again.returncode == 2
    assert f"job {job}" in again.stderr
    assert cluster.until_state(job, "COMPLETED", "FAILED", timeout_s=60) == "COMPLETED"
    assert {entry.name for entry in (folder / "code").iterdir()} >= {"planting.py", "it.yaml", ".gitignore"}
    assert not (folder / "code/ignored.txt").exists()
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if secret.encode() in file.read_bytes()]


def test_logs_while_waiting_and_taking_it_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, run_file(tmp_path), "launch.slurm.sbatch=[--begin=now+1hour]")
    said = bigtrain(tmp_path, "runs", "logs", "it").stdout
    assert f"waiting in the queue: job {job}: (BeginTime)" in said
    assert "waiting" in bigtrain(tmp_path, "runs", "list").stdout
    assert bigtrain(tmp_path, "runs", "stop", "it").stdout == f"job {job} is cancelled\n"
    assert cluster.state(job) == "CANCELLED"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "nowhere"}, "invalid partition"),
        ({"gpus_per_node": 8}, "the cluster refuses the job"),
        ({"nodelist": "n[1-9]"}, "the cluster refuses the job"),
    ],
)
def test_what_the_cluster_refuses_leaves_nothing(
    cluster: Cluster, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = run_file(tmp_path)
    done = bigtrain(tmp_path, "launch", str(path), "--target=slurm", profile(tmp_path, **changes), "--nodes=2")
    assert done.returncode == 2
    assert words in done.stderr
    assert "  do: " in done.stderr
    assert not (tmp_path / "runs").exists()


def test_by_hand_in_a_batch_script_and_in_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """The template, submitit and its arrays come to the same numbers."""
    script = (
        (launching.ROOT / "slurm/batch.sh").read_text().replace("exec bigtrain", f"exec {sys.executable} -m bigtrain")
    )
    (tmp_path / "batch.sh").write_text(script)
    command = ["sbatch", "--parsable", "--chdir", str(tmp_path), "batch.sh", str(run_file(tmp_path, "hand"))]
    done = subprocess.run(
        command, cwd=tmp_path, env=launching.environment(), capture_output=True, text=True, check=True
    )
    job = done.stdout.strip()
    assert cluster.until_state(job, "COMPLETED", "FAILED", timeout_s=60) == "COMPLETED", (
        tmp_path / f"bigtrain-{job}.log"
    ).read_text()
    assert json.loads((tmp_path / "runs/hand/result.json").read_text())["world_size"] == 2
    if os.environ.get("BIGTRAIN_FAULTS") != "full":
        return
    array = submit(cluster, tmp_path, run_file(tmp_path, "array"), "launch.slurm.array=2")
    until(lambda: (tmp_path / "runs/array/result.json").exists(), 60, "the array's first task")
    cluster.until_state(f"{array}_1", "COMPLETED", "FAILED", timeout_s=30)
    assert cluster.job(f"{array}_1")["ExitCode"] == "0:0"
    assert numbers(tmp_path / "runs/hand") == numbers(tmp_path / "runs/array")


def test_a_sweep_is_one_array_and_ends_with_its_table(cluster: Cluster, tmp_path: Path) -> None:
    """What is finished is left out, and a task that is given back to the queue goes on by itself."""
    path = run_file(tmp_path, "base", plant=True)
    (tmp_path / "slowly").touch()
    grid = ["sweep", str(path), "optim.lr=1e-3,3e-3,1e-2"]
    where = ["--target=slurm", profile(tmp_path, exclusive=False), "--parallel=2"]
    done = tmp_path / "runs/base-lr1e-3"
    done.mkdir(parents=True)
    (done / "result.json").write_text('{"steps": 40, "metrics": {}}')
    (done / "metrics.jsonl").write_text('{"step": 40, "loss": 0.5, "epoch": 4}\n')
    shown = bigtrain(tmp_path, *grid, *where, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --array=0-1%2" in shown.stdout
    assert "× 2 runs, 2 at a time" in shown.stderr
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"base-lr1e-3"}

    submitted = bigtrain(tmp_path, *grid, *where, "--detach")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split("submitted as job ")[1].split(":")[0]
    assert "base-lr1e-3: finished already" in submitted.stdout
    first = tmp_path / "runs/base-lr3e-3"
    until(lambda: last_step(first) > 6, 60, "the training")
    os.kill(ranks_of(first / "attempts/0/submit/run.yaml")[0], signal.SIGUSR2)
    until(lambda: attempts(first)[-1] == "again", 30, "the requeueing of one task")
    (tmp_path / "slowly").unlink()
    waited = bigtrain(tmp_path, *grid, *where)  # submits nothing again, waits for all, and prints their table
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert "submitted as" not in waited.stdout
    table = waited.stdout[waited.stdout.rindex("train/loss") :].splitlines()[1:]
    trained = ("base-lr3e-3", "base-lr1e-2")
    by_loss = sorted(trained, key=lambda name: numbers(tmp_path / "runs" / name)[-1]["eval/loss"])
    assert [line.split()[0] for line in table if line] == [*by_loss, "base-lr1e-3"]  # which has no evaluation
    assert attempts(first) == ["again", "finished"]
    assert attempts(tmp_path / "runs/base-lr1e-2") == ["finished"]
    starts = [read_json(folder / "attempts/0/start.json") for folder in (first, tmp_path / "runs/base-lr1e-2")]
    assert len({start["job"] for start in starts}) == 2
    assert cluster.job(f"{job}_0")["Restarts"] == "1"

    alone = bigtrain(tmp_path, "launch", str(path), "optim.lr=3e-3", "run.name=alone")
    assert alone.returncode == 0, alone.stderr
    assert numbers(first) == numbers(tmp_path / "runs/alone")


def test_following_ends_with_the_run(cluster: Cluster, tmp_path: Path) -> None:
    process = begin(tmp_path, "launch", str(run_file(tmp_path)), "--target=slurm", profile(tmp_path), "--nodes=2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "submitted as job" in out
    assert "bigtrain runs stop" in out
    assert "step 40/40" in out
    assert out.rstrip().endswith("it: finished")
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "it.yaml") in (p.info["cmdline"] or [])]
