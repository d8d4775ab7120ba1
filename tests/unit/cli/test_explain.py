"""`bigtrain explain` as a user meets it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bigtrain.cli import main

CONFIGS = sorted(Path(__file__).parents[3].glob("configs/*.yaml"))
QUICKSTART = str(next(path for path in CONFIGS if path.stem == "quickstart"))


@pytest.fixture
def bt(monkeypatch, capsys, tmp_path):
    """Runs a command line in this process, in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bigtrain", *args])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_run_file_is_explained(bt, path, tmp_path):
    code, out, err = bt("explain", str(path), "--gpus", "2")
    assert (code, err) == (0, "")
    for heading in ("batches", "model", "sharding", "memory", "advice"):
        assert f"\n{heading}\n" in out
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_processes_is_the_run_files_unless_given(bt):
    assert ", 2 processes, engine fsdp" in bt("explain", QUICKSTART)[1].splitlines()[0]
    assert ", 3 processes, engine fsdp" in bt("explain", QUICKSTART, "--nproc", "3")[1].splitlines()[0]
    assert ", 5 processes, engine ddp" in bt("explain", QUICKSTART, "engine.name=ddp", "--gpus", "5")[1].splitlines()[0]


def test_the_runs_own_engine_is_marked(bt):
    marked = [text.split() for text in bt("explain", QUICKSTART)[1].splitlines() if text.startswith("→")]
    assert [cells[:3] for cells in marked] == [["→", "fsdp", "2"]]


def test_json_has_the_same_numbers_and_words(bt):
    code, out, _ = bt("explain", QUICKSTART, "--json", "--gpu-memory", "1")
    found = json.loads(out)
    weights = (1 * 9 + 1) * 10 + (7840 * 500 + 500) + (500 * 10 + 10)  # convolution 1→10, linear 7840→500→10
    by_engine = {each["engine"]: each for each in found["footprints"]}
    assert code == 0
    assert found["parts"]["num_parameters"] == weights
    assert by_engine["ddp"]["weights"] == 4 * weights
    assert by_engine["ddp"]["on_device"] == 4 * weights * 4 + 4 * 6  # Adam: two moments, and a counter a parameter
    assert found["advice"]["fastest"]["engine"] == "ddp"
    assert found["gpu_memory"] == 1 << 30
    assert found["batches"]["most"] == [32]
    assert found["words"]["title"].startswith("quickstart: bigmodel on digits")


def test_memory_says_what_is_left(bt):
    plain, with_memory = (bt("explain", QUICKSTART, *more)[1] for more in ((), ("--gpu-memory", "0.05")))
    assert "left" not in next(text for text in plain.splitlines() if "together" in text)
    assert "left" in next(text for text in with_memory.splitlines() if "together" in text)
    row = next(text for text in with_memory.splitlines() if text.split()[:1] == ["single"])
    assert row.split()[-2:] == ["-8.70", "MiB"]  # 51.2 MiB without 59.9
    assert "take engine.name=fsdp" in with_memory


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["optim.nmae=sgd"], "did you mean: optim.name"),
        (["model.name=bigmdel"], "model.name: bigmdel is not a model"),
        (["engine.name=single", "--gpus", "2"], "the engine single runs in one process"),
        (["--gpus", "0"], "--gpus"),
    ],
)
def test_a_wrong_run_file_ends_with_exit_code_2(bt, args, text):
    code, out, err = bt("explain", QUICKSTART, *args)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
