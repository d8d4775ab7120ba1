"""metrics.jsonl written and read: exact floats, kills, restarts, damage, a disk that is full."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.errors import RunFolderError
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.reading import load_run, merged, read_rows


def train_row(step: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": loss, "lr": [1e-3, 1e-4], **more}


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    file = MetricsFile(folder / "metrics.jsonl")
    for row in rows:
        file.log(row)
    file.close()


def test_every_float_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    generator = random.Random(0)
    bits = [struct.unpack("<d", generator.randbytes(8))[0] for _ in range(2000)]
    write(tmp_path, [train_row(step, value) for step, value in enumerate(bits, 1)])
    back = load_run(tmp_path).metrics["loss"].values
    expected = np.array(bits)
    same = back.view(np.int64) == expected.view(np.int64)
    assert (same | (np.isnan(back) & np.isnan(expected))).all()


def test_a_later_start_replaces_what_it_takes_again(tmp_path: Path) -> None:
    start = {"step": 0, "event": "start"}
    first = [start, *(train_row(step, float(step)) for step in range(1, 18)), {"step": 17, "eval/loss": 1.0}]
    second = [{"step": 10, "event": "start"}, *(train_row(step, step + 0.5) for step in range(11, 21))]
    write(tmp_path, first)
    write(tmp_path, second)
    run = load_run(tmp_path)
    assert run.metrics["loss"].steps.tolist() == list(range(1, 21))
    assert run.metrics["loss"].values.tolist() == [*map(float, range(1, 11)), *(step + 0.5 for step in range(11, 21))]
    assert "eval/loss" not in run.metrics  # of a step that has not been taken again yet
    assert [event["step"] for event in run.events] == [0, 10]


def test_without_the_word_of_a_start_the_order_of_steps_tells() -> None:
    rows = [train_row(1), train_row(2), {"step": 2, "eval/loss": 1.0}, train_row(3), train_row(2, 9.0), train_row(3)]
    kept = merged(rows)
    assert [(row["step"], row.get("loss")) for row in kept] == [(1, 0.5), (2, 9.0), (3, 0.5)]
    again = merged([train_row(1), train_row(2), {"step": 2, "eval/loss": 1.0}, {"step": 2, "eval/loss": 2.0}])
    assert [row.get("eval/loss") for row in again] == [None, None, 2.0]


def test_a_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    write(tmp_path, [train_row(1), train_row(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    write(tmp_path, [train_row(2), train_row(3)])
    problems: list[str] = []
    assert [row["step"] for row in read_rows(tmp_path, problems)] == [1, 2, 3]
    assert not problems


def test_a_file_that_is_one_cut_off_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":' + "1" * 200_000)
    write(tmp_path, [train_row(1)])
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_a_file_whose_disk_was_gone_is_opened_again(tmp_path: Path) -> None:
    """A network's disk that was mounted again has nothing of what was open on it."""
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.log({"step": 1, "loss": 1.0})
    assert file._file is not None
    with open(os.devnull) as unwritable:
        os.dup2(unwritable.fileno(), file._file)
    file.log({"step": 2, "loss": 0.5})
    assert not file.has_every_line
    file.log({"step": 3, "loss": 0.25})
    assert file.has_every_line
    file.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert said == [f"warning: {tmp_path}/metrics.jsonl: Bad file descriptor; training goes on, and lines wait"]


def test_a_disk_that_refuses_to_close_a_file_does_not_make_a_run_fail(tmp_path: Path) -> None:
    """NFS tells only then that it had no room; the run has ended well."""
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.log({"step": 1, "loss": 1.0})
    assert file._file is not None
    os.close(file._file)
    file.close()
    assert said == [f"warning: the last lines of {tmp_path}/metrics.jsonl may be lost: Bad file descriptor"]


def test_damage_in_the_middle_is_said_and_the_rest_is_read(tmp_path: Path) -> None:
    write(tmp_path, [train_row(step) for step in range(1, 6)])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1], lines[3] = lines[1][:10], b'{"step": "four"}'
    path.write_bytes(b"\n".join(lines))
    run = load_run(tmp_path)
    assert run.metrics["loss"].steps.tolist() == [1, 3, 5]
    assert "2 lines of metrics.jsonl are damaged and left out" in run.problems


@pytest.mark.parametrize(
    ("held", "problems"),
    [
        ({"config.yaml": "run: {name: x}\n"}, {"there is no metrics.jsonl"}),
        ({"metrics.jsonl": ""}, {"there is no config.yaml"}),
        ({"metrics.jsonl": "", "config.yaml": "a: [1"}, {"config.yaml cannot be read"}),
        ({"metrics.jsonl": "", "config.yaml": "a: 1", "result.json": "{"}, {"result.json cannot be read"}),
        ({"metrics.jsonl": "", "config.yaml": "a: 1", "result.json": "[]"}, {"result.json is damaged"}),
    ],
)
def test_a_folder_that_is_half_there(tmp_path: Path, held: dict[str, str], problems: set[str]) -> None:
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    run = load_run(tmp_path)
    assert {problem.partition(":")[0] for problem in run.problems} == problems
    assert (run.is_finished, run.checkpoints, dict(run.metrics)) == (False, [], {})


def test_no_run_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").touch()
    with pytest.raises(RunFolderError, match="b is not the folder of a run") as caught:
        load_run(tmp_path / "b")
    assert caught.value.remedy == f"runs in {tmp_path}: a"


def test_names_of_metrics(tmp_path: Path) -> None:
    write(tmp_path, [train_row(1, lr=[0.1]), {"step": 1, "eval/accuracy": 0.5}, train_row(2, math.inf)])
    metrics = load_run(tmp_path).metrics
    assert set(metrics) == {"train/loss", "train/lr", "train/lr/0", "train/lr/1", "eval/accuracy", "train/epoch"}
    assert metrics["loss"].values.tolist() == [0.5, math.inf]
    assert metrics.last()["eval/accuracy"] == 0.5
    with pytest.raises(KeyError):
        metrics["nothing"]


def test_checkpoints_are_those_with_a_manifest(tmp_path: Path) -> None:
    write(tmp_path, [train_row(1)])
    for name in ("step-00000020", "step-00000010", "step-00000030.tmp-0", "step-00000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "shard").write_bytes(b"12345")
    for name in ("step-00000010", "step-00000020"):
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    assert [(each.step, each.num_bytes) for each in load_run(tmp_path).checkpoints] == [(10, 7), (20, 7)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system that fills up")
def test_a_full_disk_is_said_once_and_lines_wait(tmp_path: Path) -> None:
    """On a real file system of 64 KiB."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        (small / "ballast").write_bytes(b"0" * 40_000)
        said: list[str] = []
        file = MetricsFile(small / "metrics.jsonl", said.append)
        for step in range(1, 1001):
            file.log(train_row(step))
        assert [line for line in said if "No space left on device" in line] == said
        assert len(said) == 1
        held = (small / "metrics.jsonl").read_bytes()
        assert held.endswith(b"\n")  # no half of a line
        assert 0 < held.count(b"\n") < 1000
        os.remove(small / "ballast")
        file.log(train_row(1001))
        file.close()
        assert [row["step"] for row in map(json.loads, (small / "metrics.jsonl").read_text().splitlines())] == list(
            range(1, 1002)
        )
        assert len(said) == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_step_that_no_array_holds_is_damage(tmp_path: Path) -> None:
    rows = ({"step": step, "epoch": 0, "loss": 0.5} for step in (-5, 1, 10**30))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(tmp_path)
    assert run.metrics["train/loss"].steps.tolist() == [1]
    assert any("2 lines of metrics.jsonl are damaged" in problem for problem in run.problems)


def test_a_run_without_its_run_file_has_no_settings(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 0.5}\n')
    assert load_run(tmp_path).settings == {}
