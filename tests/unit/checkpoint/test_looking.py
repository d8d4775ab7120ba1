"""What verify, diff and describe say."""

from __future__ import annotations

import math

import pytest
import torch

from bigtrain.checkpoint import describe, diff, verify
from bigtrain.checkpoint import looking as looking_module
from bigtrain.checkpoint.looking import Difference
from bigtrain.state import EngineState
from tests.helpers.checkpoints import EXTRA, cut, saved, some_tensors


def test_verify_reads_all_of_a_good_one(tmp_path):
    path = saved(tmp_path, 1, cut("flat", some_tensors(), 3))
    (path / "notes.txt").write_text("mine")
    found = verify(path)
    assert found.is_good
    assert found.num_files == 5
    assert found.num_bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != "notes.txt")
    assert found.strangers == ("notes.txt",)


def test_verify_names_every_bad_file(tmp_path):
    path = saved(tmp_path, 1, cut("flat", some_tensors(), 3))
    for name in ("shard-00000.safetensors", "shard-00002.safetensors"):
        raw = bytearray((path / name).read_bytes())
        raw[-1] ^= 1
        (path / name).write_bytes(raw)
    assert [fault.file for fault in verify(path).faults] == [str(path / f"shard-0000{n}.safetensors") for n in (0, 2)]


@pytest.mark.parametrize("layout", ["group", "columns"])
def test_equal_states_are_equal_whatever_wrote_them(tmp_path, layout):
    tensors = some_tensors() | {
        ("weight", "none"): torch.zeros(0, 3),
        ("weight", "nan"): torch.tensor([math.nan, -0.0]),
    }
    one, other = saved(tmp_path / "a", 1, cut("rows", tensors, 2)), saved(tmp_path / "b", 9, cut(layout, tensors, 3))
    assert diff(one, other) == looking_module.Comparison(len(tensors), ())


def test_diff_says_what_differs_and_by_how_much(tmp_path, monkeypatch):
    monkeypatch.setattr(looking_module, "_AT_ONCE", 4)
    ours, theirs = some_tensors(), {key: tensor.clone() for key, tensor in some_tensors().items()}
    theirs["weight", "up"][6, 4] += 0.5
    theirs["weight", "up"][0, 0] -= 0.25
    theirs["exp_avg", "bias"][3] = math.nan
    theirs["buffer", "count"] = theirs["buffer", "count"].double()
    theirs["weight", "new"] = theirs.pop(("weight", "scale"))
    one = saved(
        tmp_path / "a",
        1,
        [EngineState(s.pieces, {"w": {"lr": 0.1, "betas": (0.9, 0.95)}}) for s in cut("rows", ours, 2)],
    )
    other = saved(
        tmp_path / "b",
        1,
        [EngineState(s.pieces, {"w": {"lr": 0.2, "betas": (0.9, 0.95)}}) for s in cut("flat", theirs, 3)],
    )
    found = {(d.kind, d.name): d for d in diff(one, other).differences}
    assert len(diff(one, other).differences) == 6
    assert found["weight", "up"] == Difference("weight", "up", "2 of 35 elements differ", pytest.approx(0.5))
    assert math.isnan(found["exp_avg", "bias"].largest)
    assert found["buffer", "count"].what == "(3,) torch.int64 and (3,) torch.float64"
    assert found["weight", "new"].what == "only in the second"
    assert found["weight", "scale"].what == "only in the first"
    assert found["hyper", "w"] == Difference("hyper", "w", "lr is 0.1 and 0.2")


def test_describe(tmp_path):
    path = saved(tmp_path, 12, cut("flat", some_tensors(), 3))
    found = describe(path)
    assert (found.step, found.num_writers, found.extra) == (12, 3, EXTRA)
    assert found.num_tensors == {"weight": 4, "exp_avg": 4, "step": 4, "buffer": 1}
    assert found.num_parameters == 7 * 5 + 3 * 2 * 11 + 13 + 1
    assert found.num_elements["buffer"] == 3
    assert found.num_bytes == sum(file.stat().st_size for file in path.iterdir())
