"""Which folders count as checkpoints, and which are taken away."""

from __future__ import annotations

import errno
import os

import pytest

from bigtrain.checkpoint import diff, find, prune, verify
from bigtrain.checkpoint.files import Files
from bigtrain.errors import CheckpointError, CorruptError
from tests.helpers.checkpoints import cut, save_all, saved, some_tensors

STATES = cut("rows", some_tensors(), 1)


def steps(folder):
    return [int(path.name[5:]) for path in find(folder)]


def test_the_newest_comes_first_by_number_and_not_by_name(tmp_path):
    for step in (5, 100_000_000, 99_999_999, 0):
        saved(tmp_path, step, STATES)
    assert steps(tmp_path) == [100_000_000, 99_999_999, 5, 0]
    assert find(tmp_path / "none") == []


def test_only_committed_folders_count(tmp_path):
    path = saved(tmp_path, 5, STATES)
    (tmp_path / "step-00000009").symlink_to(path)
    for name in ("step-00000008", "step-00000007.tmp-0", "step-00000006.bad", "step-7", "step-000000010", "other"):
        (tmp_path / name).mkdir()
        if name != "step-00000008":
            (tmp_path / name / "manifest.json").write_text("")
    (tmp_path / "latest").write_text("step-00000008")
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (None, None, [7, 6, 5, 4, 3, 2, 1]),
        (3, None, [7, 6, 5]),
        (1, None, [7, 6]),
        (2, 3, [7, 6, 3]),
        (1, 2, [7, 6, 4, 2]),
        (None, 3, [7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_prune_keeps_the_newest_two_at_least(tmp_path, keep, every, left):
    for step in range(1, 8):
        saved(tmp_path, step, STATES)
    removed = prune(tmp_path, keep, every)
    assert steps(tmp_path) == left
    assert sorted(path.name for path in removed) == [f"step-{n:08d}" for n in range(1, 8) if n not in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_prune_takes_away_what_killed_writers_left_and_nothing_else(tmp_path):
    saved(tmp_path, 1, STATES)
    for name in ("step-00000002.tmp-0", "step-00000003.bad", "mine"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "deeper" / "file").write_text("")
    (tmp_path / "step-00000002.tmp-0" / "link").symlink_to(tmp_path / "mine")
    assert prune(tmp_path, keep=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step-00000001", "step-00000003.bad"]
    assert (tmp_path / "mine" / "deeper" / "file").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_failing_newest_save_costs_nothing(tmp_path, keep):
    for step in (1, 2):
        saved(tmp_path, step, STATES)
    for step in range(3, 10):
        fail = {"left": step}

        def hook(operation, path, fail=fail):
            fail["left"] -= 1
            if not fail["left"]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        save_all(tmp_path, step, STATES, files=Files(hook))
        prune(tmp_path, keep)
        assert steps(tmp_path) == [2, 1]


def test_what_is_half_removed_is_no_checkpoint(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step, STATES)

    def hook(operation, path):
        if operation == "remove":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        prune(tmp_path, 2, files=Files(hook))
    assert steps(tmp_path) == [3, 2]
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("look", [verify, lambda path, files: diff(path, path, files=files)])
def test_what_is_pruned_while_it_is_read_is_not_called_damaged(tmp_path, look):
    """A run that goes on takes its old checkpoints away whoever looks at them."""
    for step in (1, 2, 3):
        saved(tmp_path, step, STATES)

    def prune_then(operation, path):
        if operation == "open" and path.name.startswith("shard"):
            prune(tmp_path, 2)

    with pytest.raises(CheckpointError, match="has been removed while it was read") as caught:
        look(find(tmp_path)[-1], files=Files(prune_then, pauses=(0.001,)))
    assert not isinstance(caught.value, CorruptError)
    assert steps(tmp_path) == [3, 2]
