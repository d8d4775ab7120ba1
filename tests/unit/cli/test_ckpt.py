"""`bigtrain ckpt` as a user calls it."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import bigtrain
from bigtrain import runs
from bigtrain.checkpoint import find
from bigtrain.cli import app
from bigtrain.cli.ckpt import _leaving_nothing
from bigtrain.errors import CheckpointError, CorruptError, RunFolderError
from tests.helpers.resuming import config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return bigtrain.train(config(tmp_path_factory.mktemp("run")), ["checkpoint.keep=null"]).path


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ckpt", *map(str, arguments)])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_show(run):
    code, text = call("show", run)
    assert code == 0
    assert re.search(r"step +12, 44 samples", text)
    assert "written by    single on 1 process" in text
    described = json.loads(call("show", run, "--json", "--tensors")[1])
    assert described["step"] == 12
    assert described["tensors"]["weight embed_tokens.weight"] == [[257, 16], "float32"]
    assert described["parameters"] == sum(
        int(np.prod(shape)) for name, (shape, _) in described["tensors"].items() if name.startswith("weight ")
    )
    older = find(run / "checkpoints")[1]
    assert json.loads(call("show", older, "--json")[1])["step"] == 10


@pytest.mark.slow
def test_an_older_one_is_not_taken_for_the_newest_whose_manifest_has_gone(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (find(copy / "checkpoints")[0] / "manifest.json").unlink()
    code, text = call("verify", copy)
    assert code == 1
    assert text.startswith("DAMAGED ")
    assert text.endswith("step-00000012/manifest.json is damaged: it is not there\n")
    for take in (
        lambda: call("export", copy, tmp_path / "out", "--to=hf"),
        lambda: bigtrain.load_trained(copy).__enter__(),
    ):
        with pytest.raises(CorruptError, match="it is not there"):
            take()


def test_a_run_has_a_name(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    assert call("show", run.name) == call("show", run.relative_to(Path.cwd()))
    with pytest.raises(CheckpointError, match="there is no checkpoint at another") as caught:
        call("show", "another")
    assert "its name where it is in runs/" in caught.value.remedy


def test_verify_names_the_damaged_file(run, tmp_path):
    code, text = call("verify", run)
    assert code == 0
    assert ": good, 3 files" in text
    copy = tmp_path / "step-00000012"
    shutil.copytree(find(run / "checkpoints")[0], copy)
    (copy / "note.txt").write_text("mine")
    shard = copy / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 4
    shard.write_bytes(raw)
    code, text = call("verify", copy)
    assert code == 1
    assert f"DAMAGED  {shard}" in text
    assert "not part of it: note.txt" in text
    found = json.loads(call("verify", copy, "--json")[1])
    assert (found["is_good"], [fault["file"] for fault in found["faults"]]) == (False, [str(shard)])


def test_diff(run):
    first, second = find(run / "checkpoints")[:2]
    code, text = call("diff", first, first)
    assert code == 0
    assert "0 things differ" in text
    code, text = call("diff", first, second, "--json")
    assert code == 1
    found = json.loads(text)
    names = {(each["kind"], each["name"]) for each in found["differences"]}
    assert ("weight", "embed_tokens.weight") in names
    assert ("weight", "layers.0.mlp.up_proj.weight") not in names  # frozen
    assert found["equal"] == 3
    shown, _, in_all = call("diff", first, second)[1].partition("in all:")
    assert shown.startswith("weight embed_tokens.weight: ")  # and not first what follows from weights that differ
    largest = max((each["largest"], each["name"]) for each in found["differences"] if each["kind"] == "exp_avg")
    count = sum(each["kind"] == "exp_avg" for each in found["differences"])
    assert f"  exp_avg: {count} differ, at most by {largest[0]:.3g} ({largest[1]})" in in_all


def test_prune(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    left = copy / "checkpoints" / "step-00000099.tmp-3"
    left.mkdir()
    code, text = call("prune", copy)
    assert code == 0
    assert "removed" in text
    assert [path.name for path in find(copy / "checkpoints")] == ["step-00000012", "step-00000010"]
    assert not left.exists()
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(RunFolderError, match="in use"):
            call("prune", copy)
        with pytest.raises(RunFolderError, match="the run run is in use"):
            call("prune", copy / "checkpoints")
        holder.kill()


HOLDS = "import sys, time; from bigtrain.runs import *; claim(sys.argv[1], 'run'); print(flush=True); time.sleep(60)"


def test_export_and_import(run, tmp_path):
    code, text = call("export", run, tmp_path / "w.pt", "--to", "torch")
    assert code == 0
    assert "as torch" in text
    assert torch.load(tmp_path / "w.pt", weights_only=True)["step"] == 12
    made = json.loads(call("import", tmp_path / "w.pt", tmp_path / "in", "--from", "torch", "--json")[1])["path"]
    assert call("diff", run, made)[0] == 0
    with pytest.raises(CheckpointError, match="is torch, not hf"):
        call("import", tmp_path / "w.pt", tmp_path / "in", "--from", "hf")


def test_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        call("show", tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        call("verify", tmp_path / "run")
    (tmp_path / "early" / "attempts").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        call("show", tmp_path / "early")
    assert runs.attempts(tmp_path / "run") == []


def test_what_is_no_checkpoint_is_not_called_damaged(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for command in ("show", "verify", "export"):
        arguments = [tmp_path / "out", "--to=torch"] if command == "export" else []
        with pytest.raises(CheckpointError, match=r"there is no checkpoint at .* it holds none"):
            call(command, tmp_path, *arguments)
    with pytest.raises(RunFolderError, match="is one checkpoint"):
        call("prune", find(run / "checkpoints")[0])


def test_the_reader_that_needs_numpy_alone(run, tmp_path):
    path = find(run / "checkpoints")[0]
    script = ROOT / "docs" / "read_checkpoint.py"
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'safetensors', 'bigtrain')); import runpy; "
    code += f"sys.argv = ['x', {str(path)!r}, {str(tmp_path / 'out.npz')!r}]; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "embed_tokens.weight  257×16  float32" in result.stdout
    call("export", path, tmp_path / "w.pt", "--to", "torch")
    expected = torch.load(tmp_path / "w.pt", weights_only=True)
    with np.load(tmp_path / "out.npz") as found:
        assert {name: found[name].tolist() for name in found} == {n: t.tolist() for n, t in expected["model"].items()}
    module = runpy.run_path(str(script))
    moments = module["read_tensors"](path, "exp_avg")
    assert all((moments[name] == slots["exp_avg"].numpy()).all() for name, slots in expected["optimizer"].items())
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    raw = bytearray((copy / "shard-00000.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "shard-00000.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="is not what was written"):
        module["read_tensors"](copy)
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (1, module["__doc__"] + "\n")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_middle_of_a_destructor_is_not_lost(raised):
    class Dying:
        def __del__(self):
            raise raised

    def work():
        Dying()
        time.sleep(10)

    with pytest.raises(raised), _leaving_nothing():
        work()
