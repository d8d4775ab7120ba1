"""The run folder: who may begin in it, what a launcher prepares, what is read back."""

import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigtrain import lease, runs
from bigtrain.errors import DataError, RunFolderError
from bigtrain.failures import read_errors, write_error
from bigtrain.metrics import from_json, to_json
from bigtrain.runs import (
    ATTEMPT_VARIABLE,
    Allowed,
    RunFolder,
    check_free,
    claim,
    give_back,
    release,
    write_atomically,
)


@pytest.fixture(autouse=True)
def outside_of_any_launcher(monkeypatch):
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)


def files_below(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def refused(folder, name):
    before = files_below(folder)
    for begin in (lambda: check_free(folder, name), lambda: RunFolder.create(folder, name, "new: 1\n")):
        with pytest.raises(RunFolderError) as caught:
            begin()
    assert files_below(folder) == before
    assert caught.value.remedy
    return caught.value


def test_a_run_begins_goes_on_and_finishes(tmp_path):
    runs = tmp_path / "not" / "yet" / "there"
    check_free(runs, "first")
    assert not (tmp_path / "not").exists()
    folder = RunFolder.create(runs, "first", "task: x\n")
    assert folder.config.read_text() == "task: x\n"
    assert folder.logs == (runs / "first" / "attempts" / "0" / "logs")
    assert folder.logs.is_dir()
    folder.finish({"steps": 3, "metrics": {"loss": 0.1, "worst": math.inf}})
    assert files_below(runs / "first") == ["config.yaml", "lease", "result.json"]
    assert json.loads(folder.result.read_text()) == {"steps": 3, "metrics": {"loss": 0.1, "worst": "inf"}}


def test_a_finished_run_is_not_begun_again(tmp_path):
    begun(tmp_path, "a").finish({"steps": 80, "metrics": {"accuracy": 0.975, "matrix": [[1]]}})
    error = refused(tmp_path, "a")
    assert "is finished: steps 80, accuracy 0.975" in error.problem
    assert "run.name=a-2" in error.remedy
    assert str(tmp_path / "a") in error.remedy
    (tmp_path / "a-2").mkdir()
    assert "run.name=a-3" in refused(tmp_path, "a").remedy
    (tmp_path / "a" / "result.json").write_text("torn")
    assert "is finished" in refused(tmp_path, "a").problem


def test_an_unfinished_run_goes_on_only_where_it_may(tmp_path):
    first = RunFolder.create(tmp_path, "a", "")
    assert "in use by process" in refused(tmp_path, "a").problem
    give_back(first.attempt)
    assert "has begun and not finished" in refused(tmp_path, "a").problem
    again = RunFolder.create(tmp_path, "a", "new: 1\n", Allowed(unfinished=True))
    assert (first.number, again.number) == (0, 1)
    assert again.config.read_text() == "new: 1\n"


def test_a_finished_run_goes_on_only_where_more_is_asked_for(tmp_path):
    begun(tmp_path, "a").finish({"steps": 80})
    with pytest.raises(RunFolderError, match="is finished"):
        check_free(tmp_path, "a", Allowed(unfinished=True))
    again = RunFolder.create(tmp_path, "a", "", Allowed(unfinished=True, finished=True))
    assert not again.result.exists()
    assert json.loads((again.attempt / "earlier-result.json").read_text()) == {"steps": 80}


LIVES = "import sys, time; from bigtrain.runs import *; claim(sys.argv[1], 'a'); print(flush=True); time.sleep(60)"


def test_a_live_run_is_in_use_until_its_process_is_gone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", LIVES, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for begin in (lambda: check_free(tmp_path, "a", Allowed(True, True)), lambda: claim(tmp_path, "a")):
            with pytest.raises(RunFolderError, match=f"in use by process {process.pid} on ") as caught:
                begin()
            assert "run.name=a-2" in caught.value.remedy
        process.kill()
    assert claim(tmp_path, "a").name == "1"


def test_a_dead_process_that_nobody_asks_after_holds_nothing(tmp_path):
    """As one that was killed in a container whose first process is no init: it stays in the table of processes."""
    with subprocess.Popen([sys.executable, "-c", LIVES, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert f"process {process.pid}" in str(lease.live_holder(tmp_path / "a"))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
        assert lease.live_holder(tmp_path / "a") is None
        assert claim(tmp_path, "a").name == "1"


def _refuse(path: Path, times: object = None) -> None:
    raise PermissionError(path)


def test_a_lease_from_the_future_lapses_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "a")
    monkeypatch.setattr(lease.socket, "gethostname", lambda: "another")
    file, ahead = tmp_path / "a" / "lease", time.time() + 100_000
    os.utime(file, (ahead, ahead))
    with monkeypatch.context() as patch:
        patch.setattr(lease.os, "utime", _refuse)
        assert lease.live_holder(tmp_path / "a")  # also to those who may only look
    assert lease.live_holder(tmp_path / "a")  # it may live: its clock has just gone back
    assert file.stat().st_mtime < time.time() + 1  # and from now on it is to be heard of
    os.utime(file, (stale := time.time() - lease.LAPSES_AFTER_S - 1, stale))
    assert lease.live_holder(tmp_path / "a") is None


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_is_wrong_ends_no_lease_and_keeps_none(tmp_path, monkeypatch, seconds):
    """What counts is the clock that stamps files, which all machines see."""
    monkeypatch.setattr(lease.socket, "gethostname", lambda: "elsewhere")
    lease.take(tmp_path, 0)
    monkeypatch.undo()
    now = time.time()
    monkeypatch.setattr(lease.time, "time", lambda: now + seconds)
    assert "process" in str(lease.live_holder(tmp_path))
    stale = now - lease.LAPSES_AFTER_S - 1
    os.utime(tmp_path / "lease", (stale, stale))
    assert lease.live_holder(tmp_path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["lease"]


def test_a_lease_of_another_machine_lapses(tmp_path, monkeypatch):
    claim(tmp_path, "a")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(RunFolderError, match=r"last heard of \d+ s ago"):
        claim(tmp_path, "a")
    monkeypatch.setenv("BIGTRAIN_OWNER", "job 7")  # not the owner of that lease either
    with pytest.raises(RunFolderError, match="in use"):
        claim(tmp_path, "a")
    stale = time.time() - lease.LAPSES_AFTER_S - 1
    os.utime(tmp_path / "a" / "lease", (stale, stale))
    assert claim(tmp_path, "a").name == "1"
    monkeypatch.setattr("socket.gethostname", lambda: "a third")
    assert claim(tmp_path, "a").name == "2"  # the same job, moved to another machine


def test_an_earlier_attempt_owns_nothing_any_more(tmp_path):
    claim(tmp_path, "a")
    folder = tmp_path / "a"
    assert lease.owns(folder, 0)
    give_back(folder / "attempts" / "0")
    claim(tmp_path, "a")
    assert not lease.owns(folder, 0)
    lease.drop(folder, 0)  # a forgotten writer that ends
    assert lease.owns(folder, 1)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("precious")
    assert "holds thesis.tex" in refused(tmp_path, "a").problem
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refused(tmp_path, "file").problem
    assert "is a file" in refused(tmp_path / "file", "b").problem
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "link to nothing" in refused(tmp_path, "dangling").problem


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "a").mkdir()
    assert RunFolder.create(tmp_path, "a", "").config.exists()


def test_a_launched_run_begins_in_the_attempt_of_its_launcher(tmp_path, monkeypatch):
    check_free(tmp_path, "a")
    attempt = claim(tmp_path, "a")
    (attempt / "logs" / "rank-1.log").write_text("starting")
    monkeypatch.setenv(ATTEMPT_VARIABLE, str(attempt))
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(".", "a", "task: x\n")  # its rank 0, by another way to the same folder
    assert folder.attempt == attempt
    assert "has begun and not finished" in refused(tmp_path, "a").problem
    assert RunFolder.create(tmp_path, "b", "").attempt == tmp_path / "b" / "attempts" / "0"  # not the launcher's run


def begun(folder, name, config_yaml=""):
    """A run that has begun, and whose start has ended."""
    made = RunFolder.create(folder, name, config_yaml)
    give_back(made.attempt)
    return made


def test_a_launch_that_never_began_leaves_nothing(tmp_path):
    attempt = claim(tmp_path, "a")
    (attempt / "logs" / "rank-0.log").write_text("error: no such model")
    release(attempt)
    assert list(tmp_path.iterdir()) == []
    check_free(tmp_path, "a")


def test_a_run_that_began_is_not_released(tmp_path):
    folder = RunFolder.create(tmp_path, "a", "")
    release(folder.attempt)
    assert folder.config.exists()


def test_of_many_that_claim_at_once_one_succeeds(tmp_path):
    together = threading.Barrier(8)
    results = []

    def begin():
        together.wait()
        try:
            results.append(claim(tmp_path, "a"))
        except RunFolderError as error:
            results.append(error.problem)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(result, Path) for result in results) == [False] * 7 + [True]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as it is for a user without the right
    assert "no permission" in refused(tmp_path, "a").problem
    monkeypatch.undo()
    with pytest.raises(RunFolderError, match="cannot make"):
        claim(tmp_path, "n" * 300)


def test_numbers_survive_json():
    value = {"a": [math.inf, -math.inf, 0.1 + 0.2], "b": {"c": (1, None, "text")}}
    text = json.dumps(to_json(value), allow_nan=False)
    numbers = [math.inf, -math.inf, 0.30000000000000004]
    assert from_json(json.loads(text)) == {"a": numbers, "b": {"c": [1, None, "text"]}}
    assert math.isnan(from_json(json.loads(json.dumps(to_json(math.nan)))))


def fail(attempt, rank):
    try:
        raise DataError("no images", where="data.args.root", remedy="give a folder")
    except DataError as error:
        write_error(attempt, rank, None if rank else 7, error)


def test_ranks_leave_word_of_why_they_failed(tmp_path):
    attempt = claim(tmp_path, "a")
    assert read_errors(attempt) == []
    for rank in (2, 0):
        process = multiprocessing.get_context("spawn").Process(target=fail, args=(attempt, rank))
        process.start()
        process.join()
        assert process.exitcode == 0
    first, second = read_errors(attempt)
    assert (first.rank, first.step, second.rank, second.step) == (2, None, 0, 7)
    assert (first.type, first.message, first.where) == ("DataError", "no images", "data.args.root")
    assert (first.remedy, first.exit_code) == ("give a folder", 2)
    assert "Traceback" in first.traceback
    assert "raise DataError" in first.traceback
    assert files_below(attempt) == ["errors/rank-00000.json", "errors/rank-00002.json"]


def test_the_first_word_of_a_rank_stays_and_any_error_can_be_told(tmp_path):
    attempt = claim(tmp_path, "a")
    write_error(attempt, 1, 3, ZeroDivisionError("division by zero"))
    write_error(attempt, 1, 4, ValueError("later"))
    (failure,) = read_errors(attempt)
    assert (failure.type, failure.message, failure.exit_code, failure.remedy) == (
        "ZeroDivisionError",
        "division by zero",
        1,
        None,
    )


def test_word_that_cannot_be_left_hides_nothing(tmp_path):
    assert write_error(tmp_path / "gone", 0, None, ValueError("the cause")) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert files_below(tmp_path) == ["result.json"]


def test_checkpoints_without_their_run_file_are_a_run_that_has_begun(tmp_path):
    """A new run's checkpoints must not mix with those that are there."""
    (begun(tmp_path, "a").checkpoints / "step-00000007").mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").unlink()
    assert "has begun and not finished" in refused(tmp_path, "a").problem
    check_free(tmp_path, "a", Allowed(unfinished=True))


def test_a_start_that_could_not_write_gives_the_run_back(tmp_path):
    """In the same process, which lives on as a notebook's does."""
    (tmp_path / "a" / "config.yaml").mkdir(parents=True)  # which no file can replace
    (tmp_path / "a" / "attempts").mkdir()
    with pytest.raises(RunFolderError, match="cannot write to"):
        RunFolder.create(tmp_path, "a", "", Allowed(unfinished=True))
    (tmp_path / "a" / "config.yaml").rmdir()
    assert RunFolder.create(tmp_path, "a", "", Allowed(unfinished=True)).number == 1


def test_a_start_that_a_full_disk_refused_leaves_no_folder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    for refusing in (
        lambda patch: patch.setattr(runs, "write_atomically", full),
        lambda patch: patch.setattr(lease, "take", full),
    ):
        with monkeypatch.context() as patch:
            refusing(patch)
            with pytest.raises(RunFolderError, match="No space left on device"):
                RunFolder.create(tmp_path, "a", "")
        assert list(tmp_path.iterdir()) == []
    assert begun(tmp_path, "a").number == 0


def test_a_finished_run_that_is_not_to_be_resumed_says_that_both_are_needed(tmp_path: Path) -> None:
    claim(tmp_path, "a")
    (tmp_path / "a" / "result.json").write_text('{"steps": 10}')
    lease.drop(tmp_path / "a", 0)
    with pytest.raises(RunFolderError) as caught:
        runs.check_free(tmp_path, "a", runs.Allowed())
    assert "set checkpoint.resume=auto to go on, and raise train.steps" in str(caught.value)
    with pytest.raises(RunFolderError) as caught:
        runs.check_free(tmp_path, "a", runs.Allowed(unfinished=True))
    assert "raise train.steps or train.epochs to go on" in str(caught.value)
    assert "checkpoint.resume" not in str(caught.value)


@contextmanager
def files_of_at_most(num_bytes):
    """What a full disk does: folders can be made, and longer files cannot."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_start_that_finds_the_disk_full_leaves_nothing_and_may_try_again(tmp_path):
    with files_of_at_most(0), pytest.raises(RunFolderError, match="cannot make"):
        RunFolder.create(tmp_path, "mine", "new: 1\n")
    assert list(tmp_path.iterdir()) == []
    RunFolder.create(tmp_path, "mine", "new: 1\n")


def test_a_finished_run_that_a_full_disk_keeps_from_going_on_stays_finished(tmp_path):
    folder = RunFolder.create(tmp_path, "mine", "new: 1\n")
    folder.finish({"steps": 3})
    give_back(folder.attempt)
    with files_of_at_most(4096), pytest.raises(RunFolderError, match="cannot write to"):
        RunFolder.create(tmp_path, "mine", "more: 2\n" * 1000, Allowed(True, True))
    assert folder.config.read_text() == "new: 1\n"
    assert json.loads(folder.result.read_text()) == {"steps": 3}


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_copy_of_a_run_is_a_run_of_its_own(tmp_path, has_ended):
    """Somebody tries something else from where a run is, while that goes on; at W&B, too, they are two."""
    folder = RunFolder.create(tmp_path, "mine", "new: 1\n")
    (folder.path / "wandb_id").write_text("abc\n")
    if has_ended:
        give_back(folder.attempt)
    shutil.copytree(folder.path, tmp_path / "copy")
    check_free(tmp_path, "copy", Allowed(unfinished=True))
    assert RunFolder.create(tmp_path, "copy", "other: 1\n", Allowed(unfinished=True)).number == 1
    assert not (tmp_path / "copy" / "wandb_id").exists()
    assert (folder.path / "wandb_id").exists()
    assert lease.live_holder(tmp_path / "copy")
    assert bool(lease.live_holder(folder.path)) is not has_ended


def test_a_run_that_was_moved_or_has_two_names_is_the_same_run(tmp_path):
    folder = RunFolder.create(tmp_path, "mine", "new: 1\n")
    (folder.path / "wandb_id").write_text("abc\n")
    (tmp_path / "link").symlink_to(folder.path)
    assert lease.live_holder(tmp_path / "link")
    moved = folder.path.rename(tmp_path / "moved")
    assert lease.live_holder(moved)
    give_back(moved / "attempts" / "0")
    claim(tmp_path, "moved")
    assert (moved / "wandb_id").read_text() == "abc\n"
