"""Checkpoints that leave frozen weights in the file that they came from: small, tied to it, and whole for who reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bigtrain
from bigtrain import models
from bigtrain.checkpoint import diff, find, verify
from bigtrain.cli import app
from bigtrain.doors import open_whole
from bigtrain.errors import BigtrainError, CheckpointError, CombinationError, StateError
from bigtrain.evaluating import opened
from bigtrain.state import whole
from tests.helpers.resuming import config, losses, stop


def values(folder, base, weights="trainable", **changes):
    made = config(folder, checkpoint={"every_steps": 3, "keep": 3, "weights": weights}, **changes)
    made["model"]["args"]["tied"] = False
    made["optim"] = {key: value for key, value in made["optim"].items() if key != "groups"}
    made["finetune"] = {"init_from": str(base), "freeze": ["layers.*", "embed_tokens.*"], **changes.get("finetune", {})}
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    args = {"vocab": 257, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 4}
    model = models.build("gpt", args | {"dropout": 0.1})
    save_file(model.state_dict(), path := folder / "weights.safetensors")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """A run whose checkpoints hold everything, and one whose do not, broken off and gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("all", "trainable"):
        (folder / name).mkdir()
    unbroken = bigtrain.train(values(folder / "all", base, "all"))
    bigtrain.train(values(folder / "trainable", base), hooks=[stop(7)])
    return unbroken, bigtrain.train(values(folder / "trainable", base))


def newest(run):
    return find(run.path / "checkpoints")[0]


def test_only_what_trains_is_saved_and_the_run_goes_on_exactly(runs):
    unbroken, run = runs
    assert losses(run) == losses(unbroken)
    left = {name for kind, name in open_whole(newest(unbroken)).index if kind == "weight" and "lm_head" not in name}
    differences = diff(newest(unbroken), newest(run)).differences
    assert {each.name for each in differences} == {name for name in left if name != "norm.weight"}
    assert {each.kind for each in differences} == {"weight"}
    assert verify(newest(run)).is_good


def test_who_reads_it_finds_it_whole(runs, tmp_path):
    unbroken, run = runs
    for name, path in (("all", newest(unbroken)), ("trainable", newest(run))):
        done = CliRunner().invoke(app, ["ckpt", "export", str(path), str(tmp_path / f"{name}.st"), "--to=safetensors"])
        assert done.exit_code == 0, done.output
    ours, theirs = (load_file(tmp_path / f"{name}.st") for name in ("trainable", "all"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with opened(newest(run)) as trained, opened(newest(unbroken)) as other:
        for mine, its in zip(trained.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, its)


def test_a_run_can_begin_from_it(runs, tmp_path):
    _, run = runs
    again = bigtrain.train(values(tmp_path, run.path, train={"steps": 1}, optim={"lr": 0.0, "weight_decay": 0.0}))
    for name, tensor in again.model.named_parameters():
        assert torch.equal(tensor, run.model.get_parameter(name)), name
    with open_whole(newest(again)) as reader:  # which leaves frozen weights in one that leaves them itself
        out = torch.empty(257, 16)
        reader.read_into("weight", "embed_tokens.weight", whole((257, 16)), out)
        assert torch.equal(out, run.model.get_parameter("embed_tokens.weight"))


def test_show_says_where_the_rest_is(runs, base):
    _, run = runs
    assert f"19 frozen weights, which are in {base}" in CliRunner().invoke(app, ["ckpt", "show", str(run.path)]).output
    plain = json.loads(CliRunner().invoke(app, ["ckpt", "show", str(run.path), "--json"]).output)
    assert plain["left_out"] == str(base)


def test_it_is_tied_to_its_base(base, tmp_path):
    mine = tmp_path / "base.safetensors"
    mine.write_bytes(base.read_bytes())
    run = bigtrain.train(values(tmp_path, mine), hooks=[stop(4)])
    path, weights = newest(run), load_file(mine)
    mine.unlink()
    with pytest.raises(BigtrainError, match=r"base\.safetensors"):
        bigtrain.train(values(tmp_path, mine))
    with pytest.raises(CheckpointError, match="leaves 19 frozen weights in"):
        open_whole(path)

    nudged = dict(weights)
    nudged["layers.1.mlp.up_proj.weight"] = weights["layers.1.mlp.up_proj.weight"].clone()
    nudged["layers.1.mlp.up_proj.weight"][3, 5] += 1e-6
    save_file(nudged, mine)
    for attempt in (lambda: bigtrain.train(values(tmp_path, mine)), lambda: open_whole(path)):
        with pytest.raises(StateError, match=r"not the weights that .* leaves out: layers\.1\.mlp\.up_proj"):
            attempt()
    save_file({name: tensor for name, tensor in weights.items() if "up_proj" not in name}, mine)
    with pytest.raises(StateError, match=r"does not have them: layers\.0\.mlp\.up_proj"):
        open_whole(path)
    mine.write_bytes(mine.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_whole(path)
    assert find(run.path / "checkpoints")[0] == path  # a base that is wrong is no damage to the checkpoint

    mine.unlink()  # and where it has moved, the run file says so
    with open_whole(path, instead=base) as reader:
        assert reader.base.path == base
    assert losses(bigtrain.train(values(tmp_path, base)))[-1][0] == 12
    with open_whole(newest(run)) as reader:  # from then on checkpoints say the new place
        assert reader.base.path == base


def test_what_the_base_has_otherwise_is_saved(base, tmp_path):
    weights = load_file(base)
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:200].clone()
    save_file(weights, mine := tmp_path / "short.safetensors")
    new = "layers.1.mlp.up_proj.weight"
    changes = {"resize": "embed_tokens.weight", "new": new, "unfreeze": [{"at_step": 5, "match": new}]}
    run = bigtrain.train(values(tmp_path, mine, finetune=changes), hooks=[stop(3)])
    with open_whole(newest(run)) as reader:
        assert {"embed_tokens.weight", "layers.1.mlp.up_proj.weight"}.isdisjoint(reader.base.tensors)
        assert "layers.0.mlp.up_proj.weight" in reader.base.tensors


def test_a_run_without_a_base_has_nothing_to_leave_out(tmp_path):
    made = values(tmp_path, "none")
    made["finetune"] = {}
    with pytest.raises(CombinationError, match=r"checkpoint\.weights"):
        bigtrain.train(made)
