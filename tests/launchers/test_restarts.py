"""Ranks that die or hang under `bigtrain launch`: named, ended, started again, and nothing of the training lost."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bigtrain.runs import read_json
from tests.helpers.launching import (
    begin,
    bigtrain,
    environment,
    last_step,
    left_over,
    numbers,
    ranks_of,
    run_file,
    until,
)

pytestmark = pytest.mark.slow

IS_FULL = os.environ.get("BIGTRAIN_FAULTS") == "full"


def launch(folder: Path, *arguments: str, **changes: object) -> subprocess.CompletedProcess[str]:
    done = bigtrain(folder, "launch", str(run_file(folder, plant=True, **changes)), "--nproc=2", *arguments)
    assert not left_over(str(folder))
    return done


def plant(folder: Path, what: str, rank: int) -> None:
    (folder / "planted").mkdir()
    (folder / "planted" / what).write_text(str(rank))


def end_of(folder: Path, attempt: int = 0) -> dict[str, object]:
    return read_json(folder / f"runs/it/attempts/{attempt}/end.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The numbers of the unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "planted").mkdir()
    assert launch(folder).returncode == 0
    return numbers(folder / "runs/it")


DEATHS = [
    ("killed", 1, "rank 1 was ended by SIGKILL"),
    ("segfault", 0, "rank 0 was ended by SIGSEGV"),
    ("aborts", 1, "rank 1 was ended by SIGABRT"),
    ("exits", 0, "rank 0 ended with exit code 3 and left no word"),
    ("network", 1, "ConnectionResetError: planted"),
    ("leaves", 1, "rank 1 ended with exit code 0 before the run was done, and left no word"),
]


@pytest.mark.parametrize(("what", "rank", "cause"), DEATHS if IS_FULL else [DEATHS[3], DEATHS[5]])
def test_a_dead_rank_is_named_and_the_run_goes_on(
    tmp_path: Path, whole: list[dict[str, object]], what: str, rank: int, cause: str
) -> None:
    plant(tmp_path, what, rank)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr
    assert end_of(tmp_path)["cause"] == cause
    assert end_of(tmp_path)["rank"] == rank
    assert f"rank {rank}, after step " in done.stderr
    assert "starting again from " in done.stdout
    assert numbers(tmp_path / "runs/it") == whole


def test_a_rank_alone_that_leaves_with_0_is_no_stop(tmp_path: Path) -> None:
    plant(tmp_path, "leaves", 0)
    path = run_file(tmp_path, plant=True, train={"steps": 20})
    done = bigtrain(tmp_path, "launch", str(path), "--nproc=1", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert end_of(tmp_path)["cause"] == "rank 0 ended with exit code 0 before the run was done, and left no word"
    assert end_of(tmp_path, 1)["outcome"] == "finished"


@pytest.mark.parametrize("kind", ["a pipe that nobody reads", "a full disk"])
def test_where_the_output_goes_nowhere_a_run_is_started_again_all_the_same(tmp_path: Path, kind: str) -> None:
    plant(tmp_path, "killed", 1)
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        output = full if kind == "a full disk" else writer
        command = [sys.executable, "-m", "bigtrain", "launch", str(run_file(tmp_path, plant=True)), "--nproc=2"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=output, stderr=output, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    assert end_of(tmp_path)["cause"] == "rank 1 was ended by SIGKILL"
    assert end_of(tmp_path, 1)["outcome"] == "finished"


def test_a_dead_rank_is_noticed_within_a_second(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000}, launch={"max_restarts": 0})
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 3)
    began = time.time()
    os.kill(ranks_of(path)[0], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    ended = read_json(tmp_path / "runs/it/attempts/0/end.json")["time"]
    assert (
        ended - began < 4
    )  # all ranks gone, not only noticed; the bound of the latter is torchrun's tenth of a second
    assert not left_over(str(path))


HANGS = [
    ("stopped", 1, r"rank 1 is behind: stopped by a signal \(.* state T\); at \S*planting.py:\d+ in stopped"),
    ("sleeps", 0, r"rank 0 is behind: at \S*planting.py:\d+ in sleeps"),
    ("holds_the_lock", 1, r"rank 1 is behind: silent for \d+ s: .* at \S*planting.py:\d+ in holds_the_lock"),
]


@pytest.mark.parametrize(("what", "rank", "told"), HANGS)
def test_a_hanging_rank_is_named_with_its_place(tmp_path: Path, what: str, rank: int, told: str) -> None:
    plant(tmp_path, what, rank)
    # So long that a rank which is woken up to write its stacks does not come to the end of the run before it is ended.
    done = launch(tmp_path, train={"steps": 100_000}, health={"hang_timeout_s": 4.0}, launch={"max_restarts": 0})
    assert done.returncode == 124, done.stdout + done.stderr
    assert re.search(told, done.stderr), done.stderr
    assert "error: no progress after step " in done.stderr
    stacks = tmp_path / "runs/it/attempts/0/stacks"
    assert {path.name for path in stacks.iterdir()} == {"rank-00000.txt", "rank-00001.txt"}
    assert f"in {what}" in (stacks / f"rank-{rank:05d}.txt").read_text()


COLLECTIVES = [
    # Rank 1 leaves one out and waits in the next: who waits for it says where.
    ("skips", r"rank 0 is behind: in the collective all_reduce, called from \S*planting.py:\d+ in loss",
     r"rank 1 waits for it: in the backward pass"),
    # The two ranks make two of them in opposite order.
    ("other_order", r"rank 0 waits: in the collective barrier, called from \S*planting.py:\d+ in ",
     r"rank 1 waits: in the collective all_reduce, called from \S*planting.py:\d+ in "),
]  # fmt: skip


@pytest.mark.parametrize(("what", "one", "other"), COLLECTIVES if IS_FULL else COLLECTIVES[:1])
def test_collectives_that_do_not_meet(tmp_path: Path, what: str, one: str, other: str) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / what).write_text("1")
    done = launch(tmp_path, health={"hang_timeout_s": 4.0}, launch={"max_restarts": 0})
    assert done.returncode == 124, done.stdout + done.stderr
    assert re.search(one, done.stderr), done.stderr
    assert re.search(other, done.stderr), done.stderr


def test_a_hang_is_noticed_in_time_and_the_run_goes_on(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    path = run_file(tmp_path, plant=True, health={"hang_timeout_s": 4.0})
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    began = time.time()
    os.kill(ranks_of(path)[1], signal.SIGSTOP)
    (tmp_path / "slowly").unlink()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert end_of(tmp_path)["outcome"] == "hung"
    assert 3 < end_of(tmp_path)["time"] - began < 4 + 1 + 4  # the hang, noticing it, and writing the stacks
    assert numbers(tmp_path / "runs/it") == whole


def test_the_launcher_itself_is_killed(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    """No rank outlives it, and the next start goes on."""
    path = run_file(tmp_path, plant=True, data={"workers": 1})
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    process.kill()
    process.communicate()
    until(lambda: not left_over(str(tmp_path)), 10, "the end of all ranks")
    (tmp_path / "slowly").unlink()
    shown = bigtrain(tmp_path, "runs", "list").stdout
    assert "broken off" in shown
    done = bigtrain(tmp_path, "runs", "resume", "it")
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "runs/it") == whole


def test_stop_saves_and_resume_goes_on(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    path = run_file(tmp_path, plant=True)
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    again = bigtrain(tmp_path, "launch", str(path), "--nproc=2")
    assert again.returncode == 2
    assert f"in use by process {process.pid}" in again.stderr
    assert "will save and leave" in bigtrain(tmp_path, "runs", "stop", "it").stdout
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert end_of(tmp_path)["outcome"] == "stopped"
    (tmp_path / "slowly").unlink()
    assert bigtrain(tmp_path, "runs", "resume", "it").returncode == 0
    assert numbers(tmp_path / "runs/it") == whole
    assert "step 40/40" in bigtrain(tmp_path, "runs", "logs", "it").stdout
    refused = bigtrain(tmp_path, "runs", "logs", "it", "--rank=7")
    assert refused.returncode == 2
    assert "has no rank 7: it was started in 2 processes" in refused.stderr


def test_a_run_that_loses_its_folder_is_not_begun_anew(tmp_path: Path) -> None:
    """Somebody has moved it, or its disk is not there any more."""
    path = run_file(tmp_path, plant=True)
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    (tmp_path / "runs/it").rename(tmp_path / "runs/moved")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.rstrip().rpartition("\nerror: ")[2].startswith(f"the run's folder {tmp_path / 'runs/it'} has gone")
    assert not (tmp_path / "runs/it").exists()


def test_usr2_to_one_rank_means_save_and_start_again(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    path = run_file(tmp_path, plant=True)
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    os.kill(ranks_of(path)[1], signal.SIGUSR2)
    (tmp_path / "slowly").unlink()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert end_of(tmp_path)["outcome"] == "again"
    assert numbers(tmp_path / "runs/it") == whole


def test_usr2_to_the_launcher_means_save_and_be_started_again(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    """As of a batch script of somebody's own, which is told that its time is nearly over."""
    path = run_file(tmp_path, plant=True, checkpoint={"every_steps": None})
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 6)
    process.send_signal(signal.SIGUSR2)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped after step" in output
    (tmp_path / "slowly").unlink()
    again = bigtrain(tmp_path, "launch", str(path), "--nproc=2")
    assert again.returncode == 0, again.stderr
    assert numbers(tmp_path / "runs/it") == whole


def test_restarts_without_progress_are_bounded(tmp_path: Path) -> None:
    """The same error again in the same step is code, whatever its type; and deaths before a checkpoint are counted."""
    path = run_file(tmp_path, plant=True, launch={"max_restarts": 1})
    source = (tmp_path / "planting.py").read_text().replace("os.unlink(path)", "pass")
    (tmp_path / "planting.py").write_text(source.replace("os.kill(os.getpid(), signal.SIGKILL)", "os._exit(9)"))
    (tmp_path / "planted/killed").write_text("0")
    done = bigtrain(tmp_path, "launch", str(path), "--nproc=2")
    assert done.returncode == 9
    assert "starts in a row without a new checkpoint (launch.max_restarts): given up" in done.stderr
    counts = [read_json(file)["fruitless"] for file in sorted(tmp_path.glob("runs/it/attempts/*/end.json"))]
    assert counts[-1] == 2
    assert counts[0] == 1  # a start that saved a new checkpoint begins the count anew


def test_a_slow_rank_is_told_and_not_killed(tmp_path: Path) -> None:
    plant(tmp_path, "slow_from_now", 1)
    done = launch(tmp_path)
    assert done.returncode == 0
    assert re.search(r"straggler: rank 1 on \S+ is slow: by itself it takes \d{3} ms a step", done.stdout), done.stdout
    assert "straggler: rank 0" not in done.stdout


def test_a_copy_that_changes_is_found_before_it_is_saved(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    plant(tmp_path, "flips", 1)
    done = launch(tmp_path, health={"compare_every": 1000})
    assert done.returncode == 0, done.stderr
    assert end_of(tmp_path)["step"] == 5  # what would have been the next checkpoint was compared first
    assert "DivergedError: after step 10 rank 1 holds another weight" in str(end_of(tmp_path)["cause"])
    assert numbers(tmp_path / "runs/it") == whole


def test_a_data_worker_that_stalls(tmp_path: Path) -> None:
    (tmp_path / "stalling.py").write_text(
        "import time, torch\n"
        "class Stalling:\n"
        "    def __init__(self, split): self.read = 0\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, index): return self.sample()\n"
        "    def sample(self):\n"
        "        self.read += 1\n"
        "        if self.read > 40: time.sleep(600)\n"
        "        return {'tokens': torch.arange(33) % 257}\n"
        "    def fingerprint(self): return 'x'\n"
    )
    data = {"name": "stalling:Stalling", "args": {}, "batch_size": 8, "eval": "none"}
    done = launch(tmp_path, data=data, health={"hang_timeout_s": 4.0},
                  launch={"max_restarts": 0}, task="causal_lm")  # fmt: skip
    assert done.returncode == 124, done.stderr
    assert re.search(r"rank \d is.*: waiting for data at \S*stalling.py:\d+ in sample", done.stderr)


def test_ranks_are_forked_from_one_server_which_may_die_too(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    path = run_file(tmp_path, plant=True, launch={"max_restarts": 10})
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")

    def started_after(step: int) -> psutil.Process:
        until(lambda: last_step(tmp_path / "runs/it") > step and len(ranks_of(path)) == 2, what="the next start")
        return psutil.Process(ranks_of(path)[1])

    first = started_after(2)
    server, agent = first.parent(), first.parent().parent()
    for victim in (first, server, agent):
        step = last_step(tmp_path / "runs/it")
        victim.kill()
        until(lambda before=victim: not before.is_running(), what="its end")
        after = started_after(step + 1)
        assert (after.parent() == server) == (victim == first)
    (tmp_path / "slowly").unlink()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert numbers(tmp_path / "runs/it") == whole


def test_nothing_outlives_a_launcher_that_is_killed_while_ranks_start(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000})
    for number in range(12 if IS_FULL else 4):
        process = begin(tmp_path, "launch", str(path), "--nproc=2")
        until(lambda: ranks_of(path), what="the first rank")
        time.sleep(0.1 * number)
        process.kill()
        process.communicate(timeout=10)  # until nobody holds its output any more
        until(lambda: not left_over(str(path)), 5, "the end of all ranks")


def test_a_run_file_that_is_spoilt_while_the_run_is_on_ends_it(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"steps": 100_000}, launch={"max_restarts": 3})
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    until(lambda: last_step(tmp_path / "runs/it") > 3)
    path.write_text(path.read_text() + "optmi: {}\n")
    os.kill(ranks_of(path)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert out.count("starting again") == 1
    assert "optmi" in err


@pytest.mark.parametrize("seed", range(50 if IS_FULL else 1))
def test_kills_at_random(tmp_path: Path, whole: list[dict[str, object]], seed: int) -> None:
    """Up to three random ranks of a run are killed at random times, now and then the launcher or all ranks at once."""
    choose = random.Random(seed)
    path = run_file(tmp_path, plant=True, launch={"max_restarts": 10})
    (tmp_path / "slowly").touch()
    process = begin(tmp_path, "launch", str(path), "--nproc=2")
    for _ in range(choose.randint(1, 3)):
        time.sleep(choose.uniform(1.0, 9.0))
        ranks = ranks_of(path)
        victims = choose.choice([ranks[:1], ranks[1:], ranks, [process.pid]])
        for pid in victims:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        if victims == [process.pid]:
            process.communicate()
            until(lambda: not left_over(str(path)), 10, "the end of all ranks")
            process = begin(tmp_path, "launch", str(path), "--nproc=2")
    (tmp_path / "slowly").unlink()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert numbers(tmp_path / "runs/it") == whole
    assert json.loads((tmp_path / "runs/it/result.json").read_text())["steps"] == 40
