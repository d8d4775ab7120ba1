"""Disks that are full, slow or stand still, under whole runs: a real file system of its own, and real limits."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain import lease
from bigtrain.checkpoint import Background, find, verify
from bigtrain.dist import World
from bigtrain.errors import DiskFullError, TrainingError
from bigtrain.state import EngineState, Piece, whole
from tests.helpers.faulty import before_file_operations
from tests.helpers.resuming import STEPS, config, losses

pytestmark = pytest.mark.slow

# A checkpoint of the small gpt has some 140 kB.
ROOM_FOR_TWO = "420k"


@pytest.fixture
def small_disk(tmp_path):
    """A file system that takes two checkpoints of the small run, and little more."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_FOR_TWO}", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small_ext4(tmp_path):
    """A file system on a disk, past whose page cache a copy in the background goes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], check=False).returncode:
        pytest.skip("no loop device can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def values(tmp_path: Path, disk: Path, **policy: object) -> dict:
    made = config(tmp_path, checkpoint={"every_steps": 4, "keep": 2, **policy})
    made["run"]["dir"] = str(disk)
    return made


def fill(disk: Path, leave: int) -> Path:
    """Take all space but so many bytes."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - leave))
    return filler


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_was_there(tmp_path, small_disk, background):
    def fill_after_first(info):
        if info.step == 6:
            fill(small_disk, 60_000)

    with pytest.raises(DiskFullError) as caught:
        bigtrain.train(values(tmp_path, small_disk, background=background), hooks=[fill_after_first])
    assert "no space for" in caught.value.problem
    assert "bytes, and" in caught.value.problem
    folder = small_disk / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]  # nothing half-written is left
    assert verify(folder / "step-00000004").is_good


@pytest.mark.parametrize("background", [True, False])
def test_on_full_continue_trains_on_and_saves_when_there_is_room(tmp_path, small_disk, background):
    fillers = []

    def hook(info):
        if info.step == 6:
            fillers.append(fill(small_disk, 60_000))
        if info.step == 10:
            fillers.pop().unlink()

    made = values(tmp_path, small_disk, background=background, on_full="continue")
    run = bigtrain.train(made, hooks=[hook])
    assert run.outcome.steps == STEPS
    assert [path.name for path in find(run.path / "checkpoints")] == ["step-00000012", "step-00000004"]
    whole = bigtrain.train(config(tmp_path), ["run.name=whole"])
    assert losses(run) == losses(whole)


def test_a_run_that_cannot_be_marked_as_finished_says_so_and_is_given_back(tmp_path, small_disk):
    def fill_at_the_end(info):
        if info.step == STEPS:
            fill(small_disk, 0)

    with pytest.raises(TrainingError, match="cannot be marked as finished: No space left"):
        bigtrain.train(values(tmp_path, small_disk, at_end=False, every_steps=5), hooks=[fill_at_the_end])
    assert lease.live_holder(small_disk / "run") is None  # the disk had no room for a new file of that


def test_too_little_room_is_known_before_the_first_step(tmp_path, small_disk):
    fill(small_disk, 200_000)  # for one checkpoint, not for two
    steps = []
    with pytest.raises(DiskFullError, match="2 checkpoints need") as caught:
        bigtrain.train(values(tmp_path, small_disk), hooks=[lambda info: steps.append(info.step)])
    assert steps == []
    needed = int(caught.value.problem.split("need ")[1].split(" bytes")[0].replace(",", ""))
    run = bigtrain.train(config(tmp_path), ["run.name=whole"])
    real = sum(file.stat().st_size for file in find(run.path / "checkpoints")[0].iterdir())
    assert needed == pytest.approx(2 * real, rel=0.1)


def test_a_disk_that_stands_still_does_not_stop_the_training(tmp_path):
    """In the background a save may take its time: steps go on until the next one is due."""
    goes_on = threading.Event()
    waited = []

    def stall(operation: str, path: Path) -> None:
        if operation == "sync" and "step-00000004" in str(path):
            waited.append(goes_on.wait(60))

    with before_file_operations(stall):
        made = values(tmp_path, tmp_path / "disk")
        bigtrain.train(made, hooks=[lambda info: goes_on.set() if info.step == 7 else None])
    assert waited
    assert all(waited)  # step 7 came while the disk stood still


def test_a_disk_that_fills_up_under_a_copy_in_the_background(small_ext4):
    """It is large enough to go past the page cache: 20 MB, where what is left would take half of it."""
    weights = torch.arange(5 << 20, dtype=torch.float32)
    state = EngineState(
        [Piece("w", "weight", tuple(weights.shape), weights.dtype, whole(weights.shape), weights, True)], {}
    )
    background = Background(World(), small_ext4 / "checkpoints")
    background.start(1, state, extra={})
    first = background.wait()
    filler = fill(small_ext4, 10 << 20)
    background.start(2, state, extra={})
    with pytest.raises(DiskFullError, match=r"no space for .*: it needs 20,.* bytes, and 10,.* were free"):
        background.wait()
    assert find(small_ext4 / "checkpoints") == [first]
    assert verify(first).is_good
    assert len(list(first.parent.iterdir())) == 1
    filler.unlink()
    background.start(2, state, extra={})
    assert verify(background.wait()).is_good
