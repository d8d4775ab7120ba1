"""Each example runs as its README says, by public names alone, and is what it says it is."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.config.loader import load
from bigtrain.errors import DataError

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
# What docs/extending.md and bigtrain's own __all__ offer.
PUBLIC = re.compile(r"bigtrain|bigtrain\.(protocols|errors)|bigtrain\.tasks\.(classification|regression|causal_lm)")


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_file_a_readme_and_public_names(name):
    assert {"README.md", "run.yaml", f"{name}.py"} <= {path.name for path in (EXAMPLES / name).iterdir()}
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()
    load(EXAMPLES / name / "run.yaml")
    for path in (EXAMPLES / name).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                named = [str(node.module)]
                assert not [alias.name for alias in node.names if alias.name.startswith("_")]
            assert all(PUBLIC.fullmatch(each) for each in named if each.split(".")[0] == "bigtrain"), named


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_it_runs_as_its_readme_says(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder)
    commands = re.search(r"^```\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert commands is not None
    for line in commands[1].splitlines():
        words = line.split("#")[0].split()
        words = [sys.executable, *(words[1:] if words[0] == "python" else ["-m", *words])]
        options = ["engine.device=cpu"] if "train" in words else ["--seconds", "0.1"] if "sample.py" in words else []
        run(folder, *words, *options)
    metrics = json.loads((folder / "runs/run/result.json").read_text())["metrics"]
    if name == "tabular":
        assert metrics["accuracy"] > 0.95
    elif name == "series":
        assert metrics["mae"] < 0.9 * metrics["mae_of_last_week"]
    else:
        assert metrics["perplexity"] < 55
        with wave.open(str(folder / "sample.wav"), "rb") as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnframes()) == (8000, 2, 256 + 800)
            made = np.frombuffer(file.readframes(1056), "<i2")[256:]
        assert made.std() > 100
        assert sum(path.stat().st_size for path in (folder / "wavs").iterdir()) < 200_000


# ---- series ----------


@pytest.fixture
def table(tmp_path):
    run(tmp_path, sys.executable, str(EXAMPLES / "series/make_csv.py"))
    return tmp_path / "load.csv"


ARGS = {"target": "load", "context": 28, "horizon": 7, "until": "2023-01-01"}


def test_no_window_of_training_knows_what_comes_after_the_date(table):
    series = module("series")
    before = series.windows("train", csv=str(table), **ARGS)
    lines = table.read_text().splitlines()
    cut = next(number for number, line in enumerate(lines) if line.startswith("2023-01-01"))
    table.write_text("\n".join([*lines[:cut], *(f"{line[:11]}-999.0,77.0" for line in lines[cut:])]) + "\n")
    after = series.windows("train", csv=str(table), **ARGS)
    assert len(before) == len(after) == cut - 1 - 28 - 7 + 1
    for index in (0, len(before) - 1):
        assert all(torch.equal(a, b) for a, b in zip(before[index], after[index], strict=True))
    assert before.fingerprint() != after.fingerprint()


def test_a_window_is_what_stands_in_the_file(table):
    series = module("series")
    _, columns, rows = series.read(str(table))
    assert columns == ["load", "temperature"]
    held_out = series.windows("eval", csv=str(table), **ARGS)
    cut = 7 * 365 + 2  # days of 2016 to 2022
    scaled = (rows[:, 0] - rows[:cut, 0].mean()) / rows[:cut, 0].std()
    for index in (0, 11, len(held_out) - 1):
        past, (future, weekly) = held_out[index]
        torch.testing.assert_close(past[:, 0].double(), scaled[cut + index - 28 : cut + index], rtol=0, atol=1e-5)
        torch.testing.assert_close(future.double(), scaled[cut + index : cut + index + 7], rtol=0, atol=1e-5)
        torch.testing.assert_close(weekly, past[-7:, 0])
    assert cut + len(held_out) - 1 + 7 == len(rows)


@pytest.mark.parametrize(("row", "words"), [
    ("2016-01-05,1.0", "cannot be read"), ("2016-01-05,a,2.0", "cannot be read"), ("", "2016-01-06 follows"),
    ("2016-01-05,nan,2.0", "cannot be read"), ("2016-01-05,1,2,3", "cannot be read"),
    ("5.1.2016,1,2", "cannot be read"), ("2016-01-04,1.0,2.0", "2016-01-04 follows 2016-01-04"),
])  # fmt: skip
def test_a_broken_row_is_named_with_its_line(table, row, words):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:5], row, *lines[6:]]) + "\n")
    with pytest.raises(DataError, match=words) as caught:
        module("series").read(str(table))
    assert caught.value.where in (f"{table}:6", f"{table}:7")


def test_what_the_series_cannot_be_cut_into_is_refused(table):
    windows = module("series").windows
    with pytest.raises(DataError, match="no file"):
        windows("train", **ARGS, csv="nowhere.csv")
    with pytest.raises(DataError, match="no column 'lod'"):
        windows("train", **{**ARGS, "target": "lod"}, csv=str(table))
    for changes in ({"until": "2016-01-20"}, {"until": "2023-12-30"}, {"context": 3}):
        with pytest.raises(DataError, match="hold no windows"):
            windows("train", **{**ARGS, **changes}, csv=str(table))


# ---- wavenet ----------


def test_the_wavenet_sees_nothing_that_comes_later():
    wavenet = module("wavenet")
    torch.manual_seed(0)
    model = wavenet.WaveNet(channels=8, layers=4)
    steps = torch.randint(256, (1, 60))
    changed = steps.clone()
    changed[0, 25] = (changed[0, 25] + 128) % 256
    with torch.no_grad():
        before, after = model(steps)[0], model(changed)[0]
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert moved[0] == 25
    assert moved[-1] == 25 + model.context - 1  # and as far back as it says, no further


def test_mu_law_is_fine_where_sounds_are_soft(tmp_path):
    wavenet = module("wavenet")
    samples = torch.linspace(-1, 1, 4001)
    back = wavenet.from_steps(wavenet.to_steps(samples))
    assert (back - samples).abs().max() < 0.025
    soft = samples.abs() < 0.01
    assert (back - samples)[soft].abs().max() < 4e-4
    steps = wavenet.to_steps(samples)
    assert (steps[0], steps[-1]) == (0, 255)
    assert (steps.diff() >= 0).all()
    assert torch.equal(wavenet.to_steps(wavenet.from_steps(torch.arange(256))), torch.arange(256))
    wavenet.write_wav(tmp_path / "a.wav", samples, 8000)
    read, rate = wavenet.read_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert (read - samples).abs().max() < 1e-4
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="no wav file"):
        wavenet.read_wav(tmp_path / "b.wav")


# ---- tabular ----------


def test_rows_are_scaled_by_the_training_rows_alone():
    tabular = module("tabular")
    train, held_out = tabular.breast_cancer("train"), tabular.breast_cancer("eval")
    assert (len(train), len(held_out)) == (455, 114)
    assert train.rows.mean(0).abs().max() < 1e-5
    assert (train.rows.std(0) - 1).abs().max() < 1e-5
    assert held_out.rows.mean(0).abs().max() > 0.01
