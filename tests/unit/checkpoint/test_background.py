"""A checkpoint that is written while its state changes is the state as it was, and a failure is heard of."""

from __future__ import annotations

import mmap
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import Background, find, verify
from bigtrain.checkpoint import background as background_module
from bigtrain.checkpoint.files import Files
from bigtrain.dist import World
from bigtrain.errors import SaveError
from bigtrain.state import EngineState
from tests.helpers.checkpoints import assert_holds, cut, in_a_fork, saved, some_tensors


class Held:
    """A disk that takes nothing until it is let go."""

    def __init__(self):
        self.gate = threading.Event()
        self.files = Files(self)

    def __call__(self, operation, path):
        if operation == "write":
            assert self.gate.wait(10)


def poll_until_done(background):
    deadline = time.monotonic() + 10
    while (path := background.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return path


def changed(tensors):
    for tensor in tensors.values():
        tensor.copy_(torch.zeros_like(tensor))


def test_what_is_written_is_the_state_at_the_start(tmp_path):
    tensors, expected, disk = some_tensors(1), some_tensors(1), Held()
    tensors["weight", "none"] = expected["weight", "none"] = torch.zeros(0, 2)
    background = Background(World(), tmp_path, files=disk.files)
    background.start(1, cut("rows", tensors, 1)[0], extra={"samples": 4})
    background.wait_for_copy()
    changed(tensors)
    assert background.poll() is None
    assert find(tmp_path) == []
    disk.gate.set()
    path = poll_until_done(background)
    assert_holds(path, expected)
    assert background.poll() is None
    assert background.wait() is None


def test_one_at_a_time_and_every_one_right(tmp_path, caplog):
    tensors, disk = some_tensors(1), Held()
    background = Background(World(), tmp_path, files=disk.files)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    background.wait_for_copy()
    threading.Timer(0.1, disk.gate.set).start()
    for key, tensor in some_tensors(2).items():
        tensors[key].copy_(tensor)
    background.start(2, cut("rows", tensors, 1)[0], extra={})
    assert [path.name for path in find(tmp_path)][-1] == "step-00000001"
    assert "waiting for the last checkpoint" in caplog.text
    background.wait_for_copy()
    changed(tensors)
    assert_holds(background.wait(), some_tensors(2))
    assert_holds(tmp_path / "step-00000001", some_tensors(1))


def test_weights_may_change_at_once_and_moments_when_they_have_been_copied(tmp_path, monkeypatch):
    copies = threading.Event()
    copy_rest = background_module._Prepared.copy_rest

    def late(prepared):
        assert copies.wait(10)
        copy_rest(prepared)

    monkeypatch.setattr(background_module._Prepared, "copy_rest", late)
    tensors, expected = some_tensors(1), some_tensors(1)
    moments = {key: tensor for key, tensor in tensors.items() if key[0] not in ("weight", "buffer")}
    assert moments
    background = Background(World(), tmp_path)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    changed({key: tensor for key, tensor in tensors.items() if key not in moments})
    threading.Timer(0.1, copies.set).start()
    background.wait_for_copy()
    assert copies.is_set()
    changed(moments)
    assert_holds(background.wait(), expected)
    background.wait_for_copy()  # nothing is being saved: nobody waits


def test_a_failure_is_heard_of_once_and_the_next_save_works(tmp_path):
    fails = [True]

    def hook(operation, path):
        if operation == "sync" and fails and fails.pop():
            raise OSError(5, "Input/output error")

    state = cut("rows", some_tensors(), 1)[0]
    background = Background(World(), tmp_path, files=Files(hook))
    background.start(1, state, extra={})
    with pytest.raises(SaveError, match="Input/output error"):
        poll_until_done(background)
    assert background.poll() is None
    assert list(tmp_path.iterdir()) == []
    background.start(2, state, extra={})
    assert verify(background.wait()).is_good


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (torch.empty(7, 5, device="meta"), "meta"),  # found while the training waits
        (torch.eye(7, 5).to_sparse(), "dense and sparse"),  # found beside it
    ],
)
def test_a_copy_that_cannot_be_made_is_a_failure_of_the_save(tmp_path, odd, why):
    background = Background(World(), tmp_path)
    state = cut("rows", some_tensors(), 1)[0]
    pieces = [replace(p, data=odd) if p.key == ("exp_avg", "up") else p for p in state.pieces]
    background.start(1, EngineState(pieces, {}), extra={})
    background.wait_for_copy()
    with pytest.raises(SaveError, match=why):
        background.wait()
    assert list(tmp_path.iterdir()) == []


def test_memory_that_was_reserved_is_what_is_used(tmp_path):
    state = cut("rows", some_tensors(), 1)[0]
    background = Background(World(), tmp_path)
    background.reserve(1 << 16)
    before = background._buffer.data_ptr()
    for step in (1, 2):
        background.start(step, state, extra={})
        background.wait()
    assert background._buffer.data_ptr() == before


def test_processes_that_are_forked_do_not_have_the_memory(tmp_path):
    """A worker that loads data would keep the old pages, and every save would have to copy them before it writes."""
    background = Background(World(), tmp_path)
    background.reserve(8 << 20)
    background._buffer.fill_(7)
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    place = background._buffer.data_ptr()
    (region,) = (r for r in regions[1:] if int(r.split("-")[0], 16) <= place < int(re.split("[- ]", r)[1], 16))
    assert {"wf", "hg"} <= set(re.search("VmFlags: (.*)", region)[1].split())  # wiped on fork, huge pages

    def is_empty():
        assert not background._buffer.any()

    assert in_a_fork(is_empty) == 0
    assert (background._buffer == 7).all()


def test_a_forked_process_may_let_go_of_the_memory(tmp_path):
    background = Background(World(), tmp_path)
    background.reserve(64 << 20)

    def take_memory_and_let_go():
        ours = [mmap.mmap(-1, 1 << 20) for _ in range(4000)]  # wherever there is room
        for memory in ours:
            memory[:4] = b"ours"
        background.close()
        assert all(memory[:4] == b"ours" for memory in ours)

    assert in_a_fork(take_memory_and_let_go) == 0


def test_what_is_empty_lies_behind_what_is_odd(tmp_path):
    """A tensor of three bytes, and behind it some of no bytes, whose types cannot begin there."""
    tensors = {("buffer", "odd"): torch.tensor([True, False, True])}
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensors["weight", str(dtype)] = torch.zeros(0, 2, dtype=dtype)
    background = Background(World(), tmp_path)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    assert_holds(background.wait(), tensors)


def test_memory_that_the_system_refuses_is_said_and_checkpoints_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Files, "free_memory", lambda files: None)
    background = Background(World(), tmp_path)
    background.reserve(1 << 60)
    assert "1,152,921,504,606,846,976 bytes of host memory, which cannot be had (" in caplog.text
    background.start(1, cut("rows", some_tensors(), 1)[0], extra={})
    assert verify(background.wait()).is_good


@pytest.mark.parametrize("operation", ["mkdir", "create", "write", "sync", "rename", "sync folder", None])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, operation):
    """While it is copied (None), while it is written, before and after it is committed."""
    saved(tmp_path, 1, cut("rows", some_tensors(1), 1))

    def die(happening, path):
        if happening == operation and (operation != "sync folder" or path == tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        background = Background(World(), tmp_path, files=Files(die))
        if operation is None:
            background.reserve = lambda num_bytes: os.kill(os.getpid(), signal.SIGKILL)
        background.start(2, cut("rows", some_tensors(2), 1)[0], extra={})
        background.wait()

    assert os.WTERMSIG(in_a_fork(save_and_die)) == signal.SIGKILL
    newest = find(tmp_path)[0]
    assert newest.name == ("step-00000002" if operation == "sync folder" else "step-00000001")
    assert verify(newest).is_good


def test_without_memory_for_a_copy_the_training_waits(tmp_path, caplog):
    files = Files()
    files.free_memory = lambda: 1000
    background = Background(World(), tmp_path, files=files)
    tensors = some_tensors(1)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    changed(tensors)
    assert_holds(background.poll(), some_tensors(1))
    assert "and 1,000 are free: the training waits" in caplog.text
    assert background._buffer.numel() == 0
    assert Files().free_memory() > 1 << 20


def test_waiting_for_nothing_is_nothing(tmp_path):
    background = Background(World(), tmp_path)
    assert background.wait() is None
    assert background.poll() is None
