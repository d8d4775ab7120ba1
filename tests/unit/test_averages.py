"""Moving averages of weights through a whole run: broken off, unfrozen, evaluated, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import bigtrain
from bigtrain.checkpoint import diff, find, open_checkpoint
from bigtrain.cli import app
from bigtrain.errors import CheckpointError
from bigtrain.evaluating import evaluate, find_checkpoint, opened
from bigtrain.state import whole
from tests.helpers import phases, resuming, transfer
from tests.helpers.resuming import BrokenOffError, break_off, one_thread


def read(path: Path, kind: str) -> dict[str, torch.Tensor]:
    found = {}
    with open_checkpoint(find(path / "checkpoints")[0]) as reader:
        for key, spec in reader.index.items():
            if key[0] == kind:
                found[key[1]] = torch.empty(spec.shape, dtype=spec.dtype)
                reader.read_into(*key, whole(spec.shape), found[key[1]])
    return found


@pytest.mark.parametrize("at", [7])
def test_a_run_that_is_broken_off_goes_on_to_the_last_bit(tmp_path, at):
    with one_thread():
        paths = []
        for name in ("unbroken", "broken"):
            values = resuming.config(tmp_path)
            values["run"]["name"] = name
            values["optim"]["ema"] = {"decay": 0.9}
            values["data"]["eval"] = {"split": 0.3}
            if name == "broken":
                with pytest.raises(BrokenOffError):
                    bigtrain.train(values, hooks=[break_off(at)])
            paths.append(bigtrain.train(values).path)
        unbroken, broken = (find(path / "checkpoints")[0] for path in paths)
        assert diff(broken, unbroken).differences == ()
        assert read(paths[0], "ema").keys() == read(paths[0], "exp_avg").keys()  # what is frozen has none


def test_what_begins_to_train_begins_its_average_at_its_weight(tmp_path):
    values = phases.config(tmp_path)
    values["optim"]["ema"] = {"decay": 0.9}
    path = bigtrain.train(values).path
    averages, weights = read(path, "ema"), read(path, "weight")
    assert averages.keys() == read(path, "exp_avg").keys()
    assert {"lm_head.weight", "norm.weight", "layers.0.self_attn.q_proj.weight"} <= averages.keys()
    far = {name: float((averages[name] - weights[name]).norm() / weights[name].norm()) for name in averages}
    assert all(0 < distance < 0.3 for distance in far.values()), far


def test_ema_may_come_and_go_when_a_run_goes_on(tmp_path):
    values = resuming.config(tmp_path)
    for steps, ema in ((5, None), (8, {"decay": 0.9}), (10, None), (12, {"decay": 0.5})):
        values["train"]["steps"] = steps
        values["optim"]["ema"] = ema
        run = bigtrain.train(values)
        assert bool(read(run.path, "ema")) == (ema is not None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    settings = transfer.config(folder, "digits", list(range(5)), train={"steps": 12})
    settings["optim"] |= {"ema": {"decay": 0.8}}
    return bigtrain.train(settings).path


def numbers(*words: str) -> dict[str, float]:
    done = CliRunner().invoke(app, list(words))
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)["metrics"]


def test_eval_takes_what_the_run_evaluated_with_unless_told_otherwise(digits):
    own = json.loads((digits / "result.json").read_text())["metrics"]
    assert numbers("eval", str(digits), "--json")["loss"] == own["loss"]
    assert numbers("eval", str(digits), "--ema", "--json")["loss"] == own["loss"]
    assert numbers("eval", str(digits), "--no-ema", "--json")["loss"] != own["loss"]
    with opened(find_checkpoint(digits), ["optim.ema.evaluate=false"]) as trained:
        assert evaluate(trained).metrics["loss"] == numbers("eval", str(digits), "--no-ema", "--json")["loss"]


def test_export_writes_averages_if_asked(digits, tmp_path):
    for words, kind in (((), "weight"), (("--ema",), "ema")):
        out = tmp_path / f"{kind}.safetensors"
        done = CliRunner().invoke(app, ["ckpt", "export", str(digits), str(out), "--to", "safetensors", *words])
        assert done.exit_code == 0, done.output
        assert ("are written with --ema" in done.stderr) == (kind == "weight")
        tensors, expected = load_file(out), read(digits, kind)
        assert tensors.keys() == {*read(digits, "weight"), *read(digits, "buffer")}
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_averages_that_are_not_there_are_refused(tmp_path):
    path = bigtrain.train(resuming.config(tmp_path, train={"steps": 2})).path
    for words in (
        ["eval", str(path), "--ema"],
        ["ckpt", "export", str(path), str(tmp_path / "x"), "--to", "torch", "--ema"],
    ):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, CheckpointError)
        assert "holds no averages" in str(done.exception)
    assert not (tmp_path / "x").exists()
