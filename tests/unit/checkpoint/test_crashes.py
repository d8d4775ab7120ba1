"""A save that is killed or fails before any of its operations leaves the old checkpoint or the new one, no third."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import resource
import shutil
import signal
import threading

import pytest
import torch

from bigtrain.checkpoint import Ranks, bytes_of, check_space, find, open_checkpoint, prune, save, verify
from bigtrain.checkpoint.files import Files
from bigtrain.dist import World
from bigtrain.errors import DiskFullError, LeaseError, SaveError
from bigtrain.state import WEIGHT, Box, EngineState, whole
from tests.helpers.checkpoints import assert_holds, cut, in_a_fork, on_ranks, save_all, saved, some_tensors

OLD, NEW = some_tensors(1), some_tensors(2)
WRITERS = 3


class Count:
    """Counts operations, and does something before one of them."""

    def __init__(self, at=0, action=None):
        self.number, self.at, self.action = 0, at, action
        self.lock = threading.Lock()
        self.log = []

    def __call__(self, operation, path):
        with self.lock:
            self.number += 1
            self.log.append((operation, path.name))
            mine = self.number
        if mine == self.at:
            self.action()


def count_operations(folder, step, states, **options):
    count = Count()
    saved(folder, step, states, files=Files(count), **options)
    return count


@pytest.fixture(scope="module")
def num_operations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("count")
    saved(folder, 1, cut("flat", OLD, WRITERS))
    return count_operations(folder, 2, cut("flat", NEW, WRITERS)).number


def tree(folder):
    """Every file's name and hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_kill_before_any_operation_leaves_the_old_or_the_new(tmp_path, num_operations):
    outcomes = []
    for at in range(1, num_operations + 1):
        folder = tmp_path / str(at)
        saved(folder, 1, cut("flat", OLD, WRITERS))
        before = tree(folder)
        die = Count(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status = in_a_fork(lambda d=die, f=folder: saved(f, 2, cut("flat", NEW, WRITERS), files=Files(d)))
        assert os.WTERMSIG(status) == signal.SIGKILL, at
        newest = find(folder)[0]
        outcomes.append(newest.name)
        assert_holds(newest, NEW if newest.name == "step-00000002" else OLD)
        assert verify(newest).is_good
        assert before.items() <= tree(folder).items()  # the old one is as it was
        if len(find(folder)) == 1:  # the next start of the run can save that step
            saved(folder, 2, cut("flat", NEW, WRITERS), attempt="1")
        prune(folder, keep=2)
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000002"]
    # Only after the rename is it the new one: before the folder is synced.
    assert outcomes == ["step-00000001"] * (num_operations - 1) + ["step-00000002"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_an_error_in_any_operation_is_never_a_success(tmp_path, num_operations, number):
    def fail():
        raise OSError(number, os.strerror(number))

    saved(tmp_path, 1, cut("flat", OLD, WRITERS))
    before = tree(tmp_path)
    for at in range(1, num_operations + 1):
        count = Count(at, fail)
        results = save_all(tmp_path, 2, cut("flat", NEW, WRITERS), files=Files(count))
        assert all(isinstance(result, SaveError) for result in results), (at, results)
        assert len({str(result) for result in results}) == 1  # the same on every rank
        is_full = number == errno.EDQUOT and "read back" not in str(results[0])
        assert isinstance(results[0], DiskFullError) == is_full
        assert is_full or os.strerror(number) in str(results[0])
        assert tree(tmp_path) == before, (at, count.log[at - 1])
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], (at, count.log[at - 1])
    assert_holds(saved(tmp_path, 2, cut("flat", NEW, WRITERS)), NEW)


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    """A limit that the system itself enforces, in the middle of a write."""
    state = cut("replicated", {(WEIGHT, "w"): torch.zeros(300, 1000)}, 1)[0]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        with pytest.raises(DiskFullError) as caught:
            save(Ranks(World()), tmp_path, 2, state, extra={})
        text = str(caught.value)
        assert "shard-00000.safetensors: it needs 1,204,096 " in text
        assert "were free" in text
        assert list(tmp_path.iterdir()) == []

    assert in_a_fork(limited) == 0


def test_a_committed_step_is_not_overwritten(tmp_path):
    saved(tmp_path, 1, cut("flat", OLD, 2))
    before = tree(tmp_path)
    for error in save_all(tmp_path, 1, cut("flat", NEW, 2)):
        assert isinstance(error, SaveError)
        assert error.where == str(tmp_path / "step-00000001")
    assert tree(tmp_path) == before


def test_a_run_that_another_start_has_taken_over_cannot_commit(tmp_path):
    for error in save_all(tmp_path, 1, cut("flat", OLD, 2), still_ours=lambda: False):
        assert isinstance(error, LeaseError)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_cannot_lead_elsewhere(tmp_path):
    for error in save_all(tmp_path / "in", 1, cut("flat", OLD, 2), attempt="../../out"):
        assert isinstance(error, SaveError)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_read_on_one_rank_fails_on_all(tmp_path):
    states = cut("rows", OLD, 2)
    states[1] = EngineState(list(states[1].pieces), states[1].hyper)
    states[1].pieces.append(None)  # whatever goes wrong inside
    for error in save_all(tmp_path, 1, states):
        assert isinstance(error, SaveError)
        assert error.where == "rank 1"
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_synced_and_the_manifest_comes_last(tmp_path):
    log = count_operations(tmp_path, 2, cut("flat", NEW, WRITERS)).log
    written = {name for operation, name in log if operation == "create"}
    assert written == {name for operation, name in log if operation == "sync"}
    last_sync = max(n for n, (operation, name) in enumerate(log) if operation == "sync" and name != "manifest.json")
    assert log.index(("create", "manifest.json")) > last_sync
    folder = "step-00000002.tmp-0"
    tail = [step for step in log[log.index(("sync", "manifest.json")) :] if step[0] not in ("look", "close")]
    assert tail == [
        ("sync", "manifest.json"),
        ("sync folder", folder),
        ("rename", folder),
        ("sync folder", tmp_path.name),
    ]


def test_a_power_failure_leaves_the_old_or_the_new(tmp_path):
    """After every operation, whatever was not synced is lost in several ways."""
    folder = tmp_path / "run"
    saved(folder, 1, cut("flat", OLD, 1))
    log, trees = [], []

    def record(operation, path):
        trees.append(contents(folder))
        log.append((operation, path.name))

    saved(folder, 2, cut("flat", NEW, 1), files=Files(record))
    trees.append(contents(folder))
    for done in range(len(log) + 1):
        past = log[:done]
        on_disk = {name: trees[past.index(("sync", name)) + 1] for _, name in past if ("sync", name) in past}
        names_are = ("sync folder", "step-00000002.tmp-0") in past
        is_renamed = past[-1:] and past[-1][0] == "sync folder" and past[-1][1] == "run"
        for keeps_names, keeps_rename in itertools.product((True, False), repeat=2):
            lost = {path: data for path, data in trees[0].items() if path.parent.name == "step-00000001"}
            for path in trees[done].keys() - lost.keys():
                where = path.parent
                if where.name == "step-00000002" and not (keeps_rename or is_renamed):
                    where = where.with_name("step-00000002.tmp-0")
                if keeps_names or names_are:
                    synced = on_disk.get(path.name, {})
                    lost[where / path.name] = next(
                        (d for p, d in synced.items() if p.name == path.name and "2" in p.parent.name), b""
                    )
            after = tmp_path / f"{done}-{keeps_names}-{keeps_rename}"
            for path, data in lost.items():
                (after / path.parent).mkdir(parents=True, exist_ok=True)
                (after / path).write_bytes(data)
            newest = find(after)[0]
            assert_holds(newest, NEW if newest.name == "step-00000002" else OLD)
            assert verify(newest).is_good
            if done == len(log):
                assert newest.name == "step-00000002"
            shutil.rmtree(after)


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_planning_makes_no_rank_wait(tmp_path):
    """Before a rank's own file is on the disk it hears nothing from the others but that all have begun."""
    gathers = []

    def one(ranks):
        inner = ranks.gather
        ranks.gather = lambda value: (gathers.append(ranks.rank), inner(value))[1]
        create = Files(lambda operation, path: gathers.append(path.name) if operation == "sync" else None)
        save(ranks, tmp_path, 1, cut("flat", OLD, 2)[ranks.rank], extra={}, files=create)

    assert on_ranks(2, one) == [None, None]
    for rank in (0, 1):
        own = [event for event in gathers if event in (rank, f"shard-0000{rank}.safetensors")]
        assert own.index(f"shard-0000{rank}.safetensors") == 1


def test_files_that_rank_0_does_not_see_are_not_committed(tmp_path):
    """As where run.dir is a disk of each machine's own."""

    def lose(operation, path):
        if operation == "list":
            (path / "shard-00001.safetensors").unlink(missing_ok=True)

    for error in save_all(tmp_path, 1, cut("group", OLD, WRITERS), files=Files(lose)):
        assert isinstance(error, SaveError)
        assert "rank 0 does not see it" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_the_space_is_checked_beforehand(tmp_path):
    states = cut("rows", OLD, 2)
    files = Files()
    sizes = [bytes_of(state) for state in states]
    size = sum(tensor.nbytes for tensor in OLD.values())
    assert sum(sizes) == size
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        files.free_bytes = lambda path, free=free: free
        results = on_ranks(
            2, lambda ranks: check_space(ranks, tmp_path / "new", bytes_of(states[ranks.rank]), files=files)
        )
        assert [result is None for result in results] == [fits] * 2
        assert fits or f"2 checkpoints need {2 * size:,} bytes, and {2 * size - 1:,} are free" in str(results[1])
    assert Files().free_bytes(tmp_path / "a" / "b") == Files().free_bytes(tmp_path)


def test_neither_saving_nor_loading_takes_memory(tmp_path):
    """A state of 200 MB: a few chunks beside it, also where parts of columns are read."""

    def measure():
        tensor = torch.ones(5000, 10_000)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        path = save(Ranks(World()), tmp_path, 1, cut("rows", {(WEIGHT, "w"): tensor}, 1)[0], extra={})
        tensor.zero_()
        with open_checkpoint(path) as reader:
            reader.read_into(WEIGHT, "w", whole(tensor.shape), tensor)
            assert tensor.min() == tensor.max() == 1
            columns = torch.zeros(5000, 10)
            reader.read_into(WEIGHT, "w", Box((0, 77), (5000, 10)), columns)
            assert columns.min() == columns.max() == 1
            reader.read_into(WEIGHT, "w", whole(tensor.shape), tensor.view(torch.int32))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base < 64 << 10  # KiB, of 256 MiB that are allowed

    assert in_a_fork(measure) == 0
