"""Runs that start from weights: of every kind of file, matched as declared, reported, and nothing half loaded."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bigtrain
from bigtrain.doors.incoming import bring_in
from bigtrain.errors import (
    BigtrainError,
    CheckpointError,
    CombinationError,
    CorruptError,
    PatternError,
    SetupError,
    StateError,
    UserError,
)
from tests.helpers.resuming import config as gpt_config
from tests.helpers.resuming import losses, stop


class Net(nn.Module):
    def __init__(self, classes: int = 3, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).relu())


def samples(classes=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, generator=generator), index % classes) for index in range(16)]


def values(folder, **finetune):
    return {
        "run": {"name": "run", "dir": str(folder / "runs")},
        "task": "classification",
        "data": {"name": "given:samples", "batch_size": 8, "eval": "none"},
        "train": {"steps": 1},
        "optim": {"lr": 0.0, "weight_decay": 0.0},  # the weights in the end are those that it began with
        "finetune": finetune,
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none"},
    }


def begun(folder, classes=3, model=Net, **finetune):
    """The weights that a run begins with, and its report."""
    run = bigtrain.train(values(folder, **finetune), model=lambda: model(classes), data=samples(classes))
    return run.model.state_dict(), json.loads((run.path / "init_report.json").read_text())


@pytest.fixture
def weights():
    torch.manual_seed(7)
    return {name: tensor + 1 for name, tensor in Net().state_dict().items()}


def assert_begun_with(model, weights, *, but=()):
    for name, tensor in weights.items():
        if name not in but and "running" not in name and "num_batches" not in name:  # one step moved those
            assert torch.equal(model[name], tensor), name


@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint", "run"])
def test_every_kind_of_file(tmp_path, weights, form):
    if form == "safetensors":
        save_file(weights, path := tmp_path / "weights.safetensors")
    elif form == "pt":
        torch.save(weights, path := tmp_path / "weights.pt")
    else:
        source = tmp_path / "source"
        save_file(weights, tmp_path / "first.safetensors")
        run = bigtrain.train(values(source, init_from=str(tmp_path / "first.safetensors")), model=Net, data=samples())
        path = run.path if form == "run" else run.path / "checkpoints" / "step-00000001"
    model, report = begun(tmp_path, init_from=str(path))
    assert_begun_with(model, weights)
    assert report["coverage"] == 1.0
    assert (len(report["loaded"]), report["new"], report["ignored"]) == (9, [], [])


def test_a_model_that_was_pickled_is_brought_in_and_begun_with(tmp_path):
    torch.save(net := Net(), path := tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors and plain values: [\w.]*Net\n") as caught:
        begun(tmp_path, init_from=str(path))
    assert f"bigtrain ckpt import {path} OUT --from torch --allow-pickle" in caught.value.remedy
    bring_in(path, tmp_path / "out", "torch", allow_pickle=True)
    assert_begun_with(begun(tmp_path, init_from=str(tmp_path / "out"))[0], net.state_dict())


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_half_a_file_says_how_long_it_is(tmp_path, weights, form, kept):
    save = torch.save if form == "pt" else save_file
    save(weights, path := tmp_path / f"weights.{form}")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CorruptError, match="or a damaged one") as caught:
        begun(tmp_path, init_from=str(path))
    assert f"it has {path.stat().st_size:,} bytes" in caught.value.remedy
    assert not (tmp_path / "runs").exists()


def test_statistics_are_loaded_too(tmp_path, weights):
    save_file(weights, path := tmp_path / "weights.safetensors")
    model, _ = begun(tmp_path, init_from=str(path), freeze_batchnorm=True)
    assert all(torch.equal(model[name], weights[name]) for name in weights)


def test_another_number_of_classes_begins_the_head_anew_and_says_so(tmp_path, weights, capsys):
    save_file(weights, path := tmp_path / "weights.safetensors")
    settings = values(tmp_path, init_from=str(path))
    settings["track"]["progress"] = "plain"
    run = bigtrain.train(settings, model=lambda: Net(5), data=samples(5))
    report = json.loads((run.path / "init_report.json").read_text())
    assert_begun_with(run.model.state_dict(), weights, but=("head.weight", "head.bias"))
    assert report["new"] == ["head.weight", "head.bias"]
    assert report["head"] == ["head", 3]
    sizes = {name: tensor.nbytes for name, tensor in run.model.state_dict().items()}
    without = sum(size for name, size in sizes.items() if not name.startswith("head"))
    assert report["coverage"] == without / sum(sizes.values())
    assert "the output layer head begins anew: the file's has 3 outputs" in capsys.readouterr().out


def test_names_are_mapped_as_declared(tmp_path, weights):
    theirs = {name.replace("body.", "encoder.body."): tensor for name, tensor in weights.items()}
    theirs["extra.weight"] = torch.zeros(2)
    save_file(theirs, path := tmp_path / "weights.safetensors")
    model, report = begun(tmp_path, init_from=str(path), remap={"encoder.*": "*"})
    assert_begun_with(model, weights)
    assert report["remapped"]["body.0.weight"] == "encoder.body.0.weight"
    assert report["loaded"] == ["head.weight", "head.bias"]
    assert report["ignored"] == ["extra.weight"]


def test_what_is_declared_new_begins_as_without_a_file(tmp_path, weights):
    fresh = bigtrain.train(values(tmp_path / "fresh"), model=Net, data=samples()).model.state_dict()
    save_file(weights, path := tmp_path / "weights.safetensors")
    model, report = begun(tmp_path, init_from=str(path), new="body.0.*")
    assert torch.equal(model["body.0.weight"], fresh["body.0.weight"])
    assert_begun_with(model, weights, but=("body.0.weight", "body.0.bias"))
    assert report["new"] == ["body.0.weight", "body.0.bias"]


def test_a_part_is_taken_where_that_is_declared(tmp_path, weights):
    save_file(weights, path := tmp_path / "weights.safetensors")
    wide, report = begun(tmp_path, model=lambda classes: Net(classes, 9), init_from=str(path), resize="*")
    assert torch.equal(wide["body.0.weight"][:6], weights["body.0.weight"])
    assert torch.equal(wide["head.weight"][:, :6], weights["head.weight"])
    assert report["resized"]["head.weight"] == [3, 6]
    narrow, _ = begun(tmp_path / "n", model=lambda classes: Net(classes, 4), init_from=str(path), resize="*")
    assert torch.equal(narrow["body.0.weight"], weights["body.0.weight"][:4])


@pytest.mark.parametrize(
    ("finetune", "kind", "said"),
    [
        ({"remap": {"encoder.*": "*"}}, PatternError, "matches no tensor of the file"),
        ({"new": "tail.*"}, PatternError, "'tail.*' matches no parameter"),
        ({"resize": "tail.*"}, PatternError, "'tail.*' matches no parameter"),
        ({"ignore": "tail.*"}, PatternError, "'tail.*' matches no tensor of the file"),
        ({"ignore": "head.bias"}, StateError, "head.bias is not in the file"),
        ({"remap": {"body.0.bias": "head.bias"}}, PatternError, "two tensors of the file would be head.bias"),
        ({"remap": {"head.*": "body.9.*"}}, StateError, "head.weight is not in the file"),
        ({"remap": {"head.*": "body.9.*"}, "min_coverage": 0.99}, StateError, "covers 72.7%"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path, weights, finetune, kind, said):
    save_file(weights, path := tmp_path / "weights.safetensors")
    with pytest.raises(kind) as caught:
        begun(tmp_path, init_from=str(path), **finetune)
    assert said in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_enough_is_enough(tmp_path, weights):
    del weights["head.bias"]
    save_file(weights, path := tmp_path / "weights.safetensors")
    _, report = begun(tmp_path, init_from=str(path), min_coverage=0.9)
    assert report["new"] == ["head.bias"]


def test_another_architecture_is_refused_with_names(tmp_path):
    save_file(nn.Linear(4, 4).state_dict(), path := tmp_path / "weights.safetensors")
    with pytest.raises(StateError) as caught:
        begun(tmp_path, init_from=str(path))
    assert "covers 0.0% of the model" in str(caught.value)
    assert "body.0.weight is not in the file, which has weight" in str(caught.value)


class Deep(nn.Module):
    """Blocks in a list, biases or none, a norm with statistics or without, and a head."""

    def __init__(self, classes=3, *, depth=2, bias=True, norm=nn.BatchNorm1d):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=bias), norm(4)) for _ in range(depth))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Instance(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[1:], self.weight, self.bias)


@pytest.mark.parametrize(
    ("here", "further", "ignore"),
    [
        ({"depth": 1}, '"blocks.1.*"]', ["blocks.1.*"]),
        ({"bias": False}, '"blocks.*.0.bias"]', ["*.0.bias"]),
        ({"norm": Instance}, '"blocks.*.1.running_mean", "blocks.*.1.running_var"]', ["*.running_*"]),
    ],
)
def test_a_file_of_a_model_that_has_more_is_refused(tmp_path, here, further, ignore):
    weights = Deep().state_dict()
    save_file(weights, path := tmp_path / "weights.safetensors")

    def model(classes):
        return Deep(classes, **here)

    with pytest.raises(StateError) as caught:
        begun(tmp_path, model=model, init_from=str(path), min_coverage=0.1)
    assert "is of a model that has more in what this one takes from it" in str(caught.value)
    assert f"finetune.ignore: [{further}" in str(caught.value)
    assert not (tmp_path / "runs").exists()
    held, report = begun(tmp_path, model=model, init_from=str(path), ignore=ignore)
    assert_begun_with(held, {name: tensor for name, tensor in weights.items() if name in held})
    assert set(report["ignored"]) == set(weights) - set(held)


def _declared(error):
    return json.loads(error.remedy.partition("finetune.ignore: ")[2])


def test_the_list_to_ignore_is_whole_and_can_be_taken_over(tmp_path):
    """Of a file with many more blocks, and with a module that the model has not in the blocks that both have."""
    weights = Deep(depth=16).state_dict()
    weights |= {f"blocks.{number}.gate.weight": torch.ones(4) for number in range(16)}
    weights |= {"blocks.0.0.rotary_emb.inv_freq": torch.ones(2), "blocks.0.position_ids": torch.ones(2)}
    save_file(weights, path := tmp_path / "weights.safetensors")
    with pytest.raises(StateError) as caught:
        begun(tmp_path, model=Deep, init_from=str(path))
    declared = _declared(caught.value)
    assert set(declared) == {"blocks.*.gate.weight", *(f"blocks.{number}.*" for number in range(2, 16))}
    held, _ = begun(tmp_path, model=Deep, init_from=str(path), ignore=declared)
    assert_begun_with(held, {name: tensor for name, tensor in weights.items() if name in held})


def test_blocks_that_have_names_with_numbers(tmp_path):
    """As torchvision's encoder_layer_11 and denselayer24."""

    def named(weights):
        return {re.sub(r"^blocks\.(\d)", r"body.layer_\1", name): tensor for name, tensor in weights.items()}

    save_file(named(Deep().state_dict()), path := tmp_path / "weights.safetensors")
    remap = {"body.layer_*": "body.blocks.block*"}

    class Named(nn.Module):
        def __init__(self, classes=3):
            super().__init__()
            deep = Deep(classes, depth=1)
            self.body = nn.ModuleDict({"blocks": nn.ModuleDict({"block0": deep.blocks[0]})})
            self.head = deep.head

        def forward(self, x):
            return self.head(self.body["blocks"]["block0"](x))

    with pytest.raises(StateError) as caught:
        begun(tmp_path, model=Named, init_from=str(path), remap=remap)
    assert _declared(caught.value) == ["body.layer_1.*"]
    begun(tmp_path, model=Named, init_from=str(path), remap=remap, ignore=["body.layer_1.*"])


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("module.", "", '{"module.*": "*"}'),
        ("", "body.", '{"*": "body.*"}'),
    ],
)
def test_a_file_with_all_names_below_another_is_told_with_what_to_declare(tmp_path, weights, theirs, ours, said):
    weights = {f"{theirs}{name}": tensor for name, tensor in weights.items()}
    save_file(weights, path := tmp_path / "weights.safetensors")

    class Below(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            return self.body(x)

    def model(classes):
        return Below() if ours else Net(classes)

    with pytest.raises(StateError) as caught:
        begun(tmp_path, model=model, init_from=str(path))
    assert caught.value.remedy.endswith(f"finetune.remap: {said}")
    _, report = begun(tmp_path, model=model, init_from=str(path), remap=json.loads(said))
    assert report["coverage"] == 1.0


def test_a_head_of_another_kind_and_modules_of_its_own_are_the_files_business(tmp_path):
    weights = Deep().state_dict()
    weights |= {"head.0.weight": torch.ones(2), "cls.predictions.bias": torch.ones(2)}
    save_file(weights, path := tmp_path / "weights.safetensors")
    _, report = begun(tmp_path, model=Deep, init_from=str(path))
    assert set(report["ignored"]) == {"head.0.weight", "cls.predictions.bias"}
    weights["head.scale"] = torch.ones(2)
    save_file(weights, path)
    with pytest.raises(StateError, match=r'finetune.ignore: \["head.scale"\]'):
        begun(tmp_path / "taken", model=Deep, init_from=str(path))
    _, report = begun(tmp_path / "new", model=Deep, init_from=str(path), new=["head.*"])
    assert {"head.scale", "head.weight"} < set(report["ignored"])


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_bad_files_are_named_and_nothing_is_made(tmp_path, weights, capsys):
    whole = tmp_path / "weights.safetensors"
    save_file(weights, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-10])
    torch.save({"model": weights, "evil": Evil()}, tmp_path / "evil.pt")
    for name in ("cut.safetensors", "evil.pt", "absent.safetensors", "absent"):
        with pytest.raises(BigtrainError) as caught:
            begun(tmp_path, init_from=str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
    assert "run\n" not in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_a_gpt_with_other_heads(tmp_path):
    """Heads are in no tensor's shape: the weights would fit, and compute something else."""
    first = bigtrain.train(gpt_config(tmp_path, train={"steps": 1}))
    settings = gpt_config(tmp_path, finetune={"init_from": str(first.path)})
    settings["run"]["name"] = "second"
    settings["model"]["args"] |= {"heads": 1}
    with pytest.raises(StateError, match="heads is 2 there and 1 here"):
        bigtrain.train(settings)


def test_a_resumed_run_asks_for_no_weights(tmp_path):
    """The file is gone by then, as it may be for a job that is started again."""
    (tmp_path / "a").mkdir()
    first = bigtrain.train(gpt_config(tmp_path / "a", train={"steps": 2}))
    source = tmp_path / "weights"
    shutil.copytree(first.path / "checkpoints" / "step-00000002", source)
    settings = gpt_config(tmp_path)
    settings["finetune"] |= {"init_from": str(source)}
    assert bigtrain.train(settings, hooks=[stop(3)]).outcome.stopped
    shutil.rmtree(source)
    again = bigtrain.train(settings)
    assert [step for step, *_ in losses(again)] == list(range(1, 13))
    with pytest.raises(CheckpointError):
        bigtrain.train({**settings, "run": {"name": "other", "dir": str(tmp_path)}})


def test_torchvision_weights_by_name_from_the_cache(tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.manual_seed(3)
    source = models.resnet18(num_classes=1000).state_dict()
    url = models.ResNet18_Weights.IMAGENET1K_V1.url
    place = tmp_path / "hub" / "hub" / "checkpoints" / url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.save(source, place)
    settings = {
        **values(tmp_path, init_from="torchvision/IMAGENET1K_V1", freeze=["[!f]*"]),
        "model": {"name": "torchvision/resnet18", "args": {"num_classes": 2}},
    }
    images = [(torch.randn(3, 32, 32), index % 2) for index in range(8)]
    run = bigtrain.train(settings, data=images)
    model = run.model.state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in source.items() if not name.startswith("fc."))
    report = json.loads((run.path / "init_report.json").read_text())
    assert report["head"] == ["fc", 1000]


def test_torchvision_weights_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def offline(*args, **options):
        raise OSError("there is no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    settings = {**values(tmp_path, init_from="torchvision/DEFAULT"), "model": "torchvision/resnet18"}
    with pytest.raises(SetupError) as caught:
        bigtrain.train(settings, data=[(torch.randn(3, 32, 32), 0)] * 8)
    assert "resnet18-f37072fd.pth" in caught.value.remedy
    assert str(tmp_path / "hub") in caught.value.remedy
    settings["finetune"] = {"init_from": "torchvision/IMAGENET_V9"}
    with pytest.raises(UserError, match="has no weights 'IMAGENET_V9'") as caught:
        bigtrain.train(settings, data=[(torch.randn(3, 32, 32), 0)] * 8)
    assert "ResNet18_Weights.IMAGENET1K_V1" in caught.value.remedy


def test_a_sharded_folder_of_hugging_face(tmp_path):
    """Made by transformers from a configuration, in many shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4,
            tie_word_embeddings=False,
        )
    )
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    settings = gpt_config(
        tmp_path, train={"steps": 1}, optim={"lr": 0.0}, finetune={"init_from": str(tmp_path / "llama")}
    )
    settings["model"]["args"] |= {"tied": False, "dropout": 0.0}
    with pytest.raises(StateError, match="norm_eps is 1e-06 there and 1e-05 here"):
        bigtrain.train(settings)
    settings["model"]["args"] |= {"norm_eps": 1e-6, "tied": True}
    with pytest.raises(StateError, match="tied is False there and True here"):
        bigtrain.train(settings)
    settings["model"]["args"] |= {"tied": False}
    model = bigtrain.train(settings).model.eval()
    tokens = torch.randint(257, (3, 4))
    with torch.no_grad():
        assert torch.allclose(model(tokens), theirs.eval()(tokens).logits, atol=1e-5)


def test_the_report_counts_what_was_read(tmp_path, weights):
    save_file(weights, path := tmp_path / "weights.safetensors")
    _, report = begun(tmp_path, init_from=str(path))
    assert report["bytes_covered"] == sum(tensor.nbytes for tensor in load_file(path).values())


@pytest.mark.parametrize("said", [{"new": "head.*"}, {"remap": {"a.*": "b.*"}}, {"resize": "*"}, {"min_coverage": 0.5}])
def test_what_is_said_of_a_file_needs_one(tmp_path, said):
    with pytest.raises(CombinationError, match="this one begins with none"):
        begun(tmp_path, **said)
    assert not (tmp_path / "runs").exists()


def test_what_begins_anew_does_not_stay_frozen(tmp_path, weights):
    save_file(weights, path := tmp_path / "weights.safetensors")
    with pytest.raises(StateError, match=r"would never train: body.0.weight, body.0.bias") as caught:
        begun(tmp_path, init_from=str(path), new="body.0.*", freeze="body.*")
    assert caught.value.where == "finetune.freeze"
    thaw = [{"at_step": 1, "match": "body.0.*"}]
    _, report = begun(tmp_path, init_from=str(path), new="body.0.*", freeze="body.*", unfreeze=thaw)
    assert report["new"] == ["body.0.weight", "body.0.bias"]
