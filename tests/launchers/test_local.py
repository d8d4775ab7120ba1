"""`bigtrain launch` with real torchrun, real ranks and real failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from bigtrain.config.loader import from_dict
from bigtrain.errors import CombinationError
from launchers.plan import count_cores, make_plan
from tests.helpers.launching import begin, kill, ranks_of, until

ROOT = Path(__file__).parents[2]

TASKS = '''
import atexit, os, pathlib, signal, sys, threading, time
import torch
from bigtrain.errors import DataError
from bigtrain.tasks.classification import Classification

RANK = int(os.environ.get("RANK", 0))


class Failing(Classification):
    """Works for two steps; then one rank does what `how` says."""

    def __init__(self, how, rank=1):
        super().__init__()
        self.how, self.rank, self.calls = how, rank, 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == 3 and RANK == self.rank:
            getattr(self, self.how)(batch)
        return super().loss(model, batch)

    def raises(self, batch):
        raise ZeroDivisionError("planted in the third step")

    def killed(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)

    def crashes(self, batch):
        os.kill(os.getpid(), signal.SIGSEGV)

    def runs_out_of_memory(self, batch):
        torch.empty(1 << 50)

    def poisons(self, batch):
        batch.data[0].fill_(float("nan"))

    def works(self, batch):
        pass

    def check(self, model, batch):
        if self.how == "refuses" and RANK == self.rank:
            time.sleep(1)
            raise DataError("planted on rank 1")
        super().check(model, batch)

    def sleeps(self, batch):
        time.sleep(600)

    def lives(self, batch):
        log = pathlib.Path(os.environ["BIGTRAIN_ATTEMPT_DIR"], "logs", "rank-00000.stderr")
        atexit.register(print, "the handler ran", file=sys.stderr)
        threading.Thread(target=self.outlasts).start()
        print("\\r 10 %", end="", file=sys.stderr, flush=True)
        deadline = time.monotonic() + 5
        while log.read_bytes() != b"\\r 10 %":
            if time.monotonic() > deadline:
                raise RuntimeError("a line without an end is kept")
            time.sleep(0.05)
        print(file=sys.stderr)

    def outlasts(self):
        threading.main_thread().join()
        print("the thread ended", file=sys.stderr)
'''


def run_file(folder: Path, task: Any = "classification", **changes: Any) -> Path:
    (folder / "planted.py").write_text(TASKS)
    run = {
        "run": {"name": "it", "dir": str(folder / "runs")},
        "task": task,
        "model": {"name": "bigmodel"},
        "data": {
            "name": "synthetic",
            "args": {"kind": "classification", "samples": 64, "shape": [1, 28, 28], "classes": 10},
            "batch_size": 8,
        },
        "train": {"steps": 6},
        "engine": {"name": "ddp"},
        "launch": {"max_restarts": 0},
        "track": {"log_every": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **changes}))
    return path


def launch(path: Path, *arguments: str, debug: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in the folder of the run file, and see that nothing is left behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--debug"] if debug else []
    command = [sys.executable, "-m", "bigtrain", *options, "launch", str(path), "--nproc=2", *arguments]
    done = subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    left = [p.info for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]
    assert not left
    return done


def test_a_run_that_works(tmp_path: Path) -> None:
    done = launch(run_file(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"run folder: {tmp_path}/runs/it")
    assert done.stderr == ""
    result = json.loads((tmp_path / "runs/it/result.json").read_text())
    assert (result["steps"], result["world_size"], result["engine"]) == (6, 2, "ddp")

    logs = tmp_path / "runs/it/attempts/0/logs"
    assert "step 6/6" in (logs / "rank-00000.stdout").read_text()

    again = launch(run_file(tmp_path))
    assert again.returncode == 2
    assert "is finished" in again.stderr


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_users_error_is_told_once(tmp_path: Path, nproc: int) -> None:
    """One that only a rank can find."""
    path = run_file(tmp_path, model={"name": "torchvision/resnet18", "args": {"num_clases": 10}})
    done = launch(path, f"--nproc={nproc}")
    assert done.returncode == 2
    assert done.stderr.count("has no argument 'num_clases'") == 1
    assert not (tmp_path / "runs").exists()


def failing(how: str, rank: int = 1) -> dict[str, Any]:
    return {"name": "planted:Failing", "args": {"how": how, "rank": rank}}


@pytest.mark.slow
def test_a_forked_rank_lives_and_ends_as_any_program(tmp_path: Path) -> None:
    """What it writes comes at once, with or without a newline; its threads and its handlers end with it."""
    done = launch(run_file(tmp_path, failing("lives", 0)))
    assert done.returncode == 0, done.stderr
    assert done.stderr.split("\n") == ["", " 10 %", "the thread ended", "the handler ran", ""]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_failing_ranks_traceback_comes_last(tmp_path: Path, rank: int) -> None:
    began = time.monotonic()
    done = launch(run_file(tmp_path, failing("raises", rank)))
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()
    assert last[-1] == f"error: rank {rank}, after step 2: ZeroDivisionError: planted in the third step"
    assert last[-2] == "ZeroDivisionError: planted in the third step"
    assert any("in raises" in line for line in last)
    assert done.stderr.count("Traceback") == 1
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize(("how", "number"), [("killed", signal.SIGKILL), ("crashes", signal.SIGSEGV)])
def test_a_rank_that_a_signal_ends_is_named(tmp_path: Path, how: str, number: signal.Signals) -> None:
    done = launch(run_file(tmp_path, failing(how)))
    assert done.returncode == 128 + number
    assert f"error: rank 1, after step 2, was ended by {number.name}" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("  do: ")


@pytest.mark.slow
def test_what_a_user_can_mend_comes_without_a_traceback(tmp_path: Path) -> None:
    done = launch(run_file(tmp_path, failing("runs_out_of_memory")))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1. train.micro_batch_size=2" in done.stderr

    (tmp_path / "nan").mkdir()
    done = launch(run_file(tmp_path / "nan", failing("poisons")))
    assert done.returncode == 1
    assert "the loss is not finite in step 3" in done.stderr
    assert "rank 1: samples " in done.stderr
    assert "rank 0: samples " not in done.stderr


@pytest.mark.slow
def test_everything_ends_soon_after_a_failure_although_others_hang(tmp_path: Path) -> None:
    """Rank 0 fails while rank 1 sleeps outside of any collective and takes no notice of SIGTERM."""
    task = failing("raises", 0)
    source = TASKS.replace("self.calls == 3 and RANK == self.rank", "self.calls == 3").replace(
        "def raises(self, batch):", "def raises(self, batch):\n        if RANK == 1: time.sleep(600)"
    )
    path = run_file(tmp_path, task)
    (tmp_path / "planted.py").write_text(source)
    done = launch(path)
    failed_at = json.loads((tmp_path / "runs/it/attempts/0/errors/rank-00000.json").read_text())["time"]
    assert time.time() - failed_at < 10
    assert "error: rank 0, after step 2: ZeroDivisionError" in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_at_a_step_boundary(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000})
    command = [sys.executable, "-m", "bigtrain", "launch", str(path), "--nproc=2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "runs/it/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or b"loss" not in metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped after step" in out
    assert not (tmp_path / "runs/it/result.json").exists()


@pytest.mark.slow
def test_who_is_ended_before_it_could_save_says_so(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000}, checkpoint={"every_steps": None})
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    metrics = tmp_path / "runs/it/metrics.jsonl"
    until(lambda: metrics.exists() and b"loss" in metrics.read_bytes(), 60, "the first numbers")
    for rank in ranks_of(path):
        kill(rank, signal.SIGSTOP)  # or it could save in time
    for _ in range(3):  # of other signals two within a moment are one wish
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, _ = process.communicate(timeout=30)
    assert process.returncode >= 128
    assert out.endswith("ended at once: nothing was saved; the same command begins it\n")


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_is_said(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000})
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    assert process.stdout is not None
    first = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert first.startswith("starting 2 processes")
    assert out == "stopped before its first step: nothing was saved; the same command begins it\n"
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_a_users_error_creates_nothing(tmp_path: Path, debug: bool) -> None:
    done = launch(run_file(tmp_path, model={"name": "bigmodl"}), debug=debug)
    assert done.returncode == 2
    assert "bigmodel" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_error_that_one_rank_alone_finds_creates_nothing(tmp_path: Path) -> None:
    """Rank 0 must not begin while rank 1 is still looking at its first samples."""
    done = launch(run_file(tmp_path, failing("refuses"), engine={"name": "fsdp"}))
    assert done.returncode == 2
    assert "planted on rank 1" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_plan_shares_cores_and_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # what the caller set stays, and would hide the share
    minimal = {"task": "regression", "model": "gpt", "data": "digits", "train": {"steps": 1}}
    minimal["data"] = {"name": "digits"}
    config = from_dict({**minimal, "engine": {"name": "ddp", "device": "cpu"}}).config
    plan = make_plan(config, Path("run.yaml"), ["optim.lr=1"], nproc=2)
    assert plan.nproc == 2
    assert plan.program == ("bigtrain", "train", "run.yaml", "optim.lr=1")
    assert plan.environment["OMP_NUM_THREADS"] == str(max(1, count_cores() // 2))
    assert make_plan(config, Path("run.yaml"), []).nproc == 1
    alone = from_dict({**minimal, "engine": {"name": "single"}}).config
    with pytest.raises(CombinationError, match="single"):
        make_plan(alone, Path("run.yaml"), [], nproc=2)
