"""LoRA: what trains and what stays, small checkpoints, going on, merging, and peft's own folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import bigtrain
from bigtrain import data, models
from bigtrain.checkpoint import open_checkpoint
from bigtrain.cli import app
from bigtrain.config import schema
from bigtrain.data import EvalLoader
from bigtrain.errors import (
    BigtrainError,
    CheckpointError,
    CombinationError,
    ModelError,
    PatternError,
    RunFolderError,
    StateError,
)
from bigtrain.evaluating import find_checkpoint, opened
from bigtrain.finetune.adapters import is_adapter, merged, with_adapter
from bigtrain.prepare import _whole_pieces, fill_pieces
from bigtrain.tracking.reading import read_events, read_rows
from tests.helpers import hugging_face as made

GPT = {"vocab": 257, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and data, and weights of a gpt."""
    folder = tmp_path_factory.mktemp("lora")
    made.bert(folder / "bert")
    made.bert(folder / "body", kind="BertModel")
    made.llama(folder / "llama")
    made.reviews(folder / "reviews.csv")
    made.chats(folder / "chats.jsonl")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, so it is told " * 4)
    torch.manual_seed(9)
    state = models.build("gpt", GPT).state_dict()
    save_file({name: torch.randn_like(tensor) / 4 for name, tensor in state.items()}, folder / "gpt.safetensors")
    return folder


def gpt(folder: Path, **changes: Any) -> dict[str, Any]:
    """A gpt from the weights, with an adapter beside its attention."""
    return {
        "run": {"name": "gpt", "dir": str(folder / "runs"), "seed": 1},
        "task": "causal_lm",
        "model": {"name": "gpt", "args": GPT},
        "data": {
            "name": "text", "args": {"source": str(folder / "text.txt"), "context": 8}, "batch_size": 4, "eval": "none",
        },
        "train": {"steps": 4},
        "optim": {"lr": 0.05},
        "engine": {"device": "cpu"},
        "checkpoint": {"every_steps": 2},
        "track": {"log_every": 1, "progress": "none", "report": False},
        "finetune": {
            "init_from": str(folder / "gpt.safetensors"), "adapter": {"targets": ["*_proj"], "rank": 2, "alpha": 8},
        },
        **changes,
    }  # fmt: skip


def command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if "loss" in row and "event" not in row]


def test_only_the_adapter_trains_and_checkpoints_hold_it_alone(place: Path) -> None:
    run = bigtrain.train(gpt(place))
    theirs = load_file(place / "gpt.safetensors")
    with open_checkpoint(find_checkpoint(run.path)) as reader:
        assert {kind for kind, _ in reader.index} == {"weight", "exp_avg", "exp_avg_sq", "step"}
        assert all(is_adapter(name) for _, name in reader.index)
        assert len({name for _, name in reader.index}) == 2 * 2 * 7
        assert set(reader.extra["base"]["tensors"]) >= {"layers.0.self_attn.q_proj.base_layer.weight", "norm.weight"}
    for name, tensor in run.model.state_dict().items():
        if not is_adapter(name):
            assert torch.equal(tensor, theirs[name.replace(".base_layer.", ".")])
    (proved,) = [row for row in read_events(run.path) if row["event"] == "phase proved"][-1:]
    assert (proved["moved"], proved["frozen"]) == (28, len(theirs))
    assert "28 tensors moved" in proved["text"]


def test_it_begins_as_the_model_without_it_and_draws_as_peft_does(place: Path) -> None:
    run = bigtrain.train(gpt(place, run={"name": "first", "dir": str(place)}, optim={"lr": 0.0}, train={"steps": 1}))
    plain = gpt(place, run={"name": "plain", "dir": str(place)}, optim={"lr": 0.0}, train={"steps": 1})
    del plain["finetune"]["adapter"]
    assert losses(run.path) == losses(bigtrain.train(plain).path)
    torch.manual_seed(0)
    config = schema.Adapter(targets=("wide",), rank=64)
    by_us = nn.ModuleDict({"wide": nn.Linear(100, 30)})
    by_us.init_tensor = lambda name, tensor: None  # type: ignore[assignment]
    with_adapter(by_us, config)
    drawn = by_us["wide"].lora_A["default"].weight.detach().clone()  # type: ignore[index, union-attr]
    fill_pieces(by_us, _whole_pieces(by_us), seed=1)
    filled = by_us["wide"].lora_A["default"].weight.detach()  # type: ignore[index, union-attr]
    assert not torch.equal(drawn, filled)
    assert filled.abs().max() <= 0.1
    assert filled.std().item() == pytest.approx(drawn.std().item(), rel=0.03)
    assert filled.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_it_goes_on_bit_for_bit(place: Path) -> None:
    settings = gpt(place, run={"name": "on", "dir": str(place / "runs")})
    bigtrain.train(settings, hooks=[lambda info: info.stop() if info.step == 2 else None])
    again = bigtrain.train(settings)
    whole = bigtrain.train({**settings, "run": {"name": "whole", "dir": str(place / "runs")}})
    ours, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    changed = {**settings["finetune"], "adapter": {"targets": ["*_proj"], "rank": 3}}
    with pytest.raises(RunFolderError, match=r"finetune\.adapter"):
        bigtrain.train({**settings, "finetune": changed, "train": {"steps": 6}})


def test_the_base_is_known_by_what_it_holds(place: Path, tmp_path: Path) -> None:
    settings = gpt(tmp_path, data=gpt(place)["data"])
    shutil.copy(place / "gpt.safetensors", tmp_path)
    run = bigtrain.train(settings)
    state = load_file(tmp_path / "gpt.safetensors")
    state["norm.weight"] = state["norm.weight"] + 1
    save_file(state, tmp_path / "gpt.safetensors")
    wrong = pytest.raises(StateError, match=r"not the weights that the checkpoint leaves out: norm\.weight")
    with wrong, opened(find_checkpoint(run.path)):
        pass


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama", "bert")]


@pytest.mark.parametrize("name", ["gpt", "conv", *LATER])
def test_merged_weights_compute_the_same(name: str, place: Path, tmp_path: Path) -> None:
    """On samples of the run's data, in each form that merges."""
    settings = SETTINGS[name](place, tmp_path)
    run = bigtrain.train(settings)
    with opened(find_checkpoint(run.path)) as trained, trained.evaluating():
        inputs = INPUTS[name](place)
        adapted = trained.model(inputs)
        plain = models.build(settings["model"]["name"], settings["model"].get("args", {}) | PLAIN[name])
        for form in ("safetensors", "torch"):
            out = tmp_path / f"out.{'pt' if form == 'torch' else form}"
            command("ckpt", "export", str(run.path), str(out), "--to", form)
            weights = load_file(out) if form == "safetensors" else torch.load(out, weights_only=True)["model"]
            assert not [key for key in weights if "lora" in key or "base_layer" in key]
            missing, unexpected = plain.load_state_dict(weights, strict=False)
            assert not unexpected
            assert all("lm_head" in key for key in missing)  # tied
            assert torch.allclose(plain.eval()(inputs), adapted, atol=1e-5)
    without = without_adapter(settings, place)
    assert not torch.allclose(without.eval()(inputs), adapted, atol=1e-3)


def without_adapter(settings: dict[str, Any], place: Path) -> nn.Module:
    """The model that the adapter was put beside, trained no step."""
    finetune = {key: value for key, value in settings["finetune"].items() if key != "adapter"}
    made_new = {**settings, "finetune": finetune, "optim": {"lr": 0.0}, "run": {"name": "still", "dir": str(place)}}
    shutil.rmtree(place / "still", ignore_errors=True)
    return bigtrain.train(made_new, ["train.steps=1", "eval.every_epochs=null"]).model


def of_folder(name: str, targets: list[str]) -> Any:
    def settings(place: Path, folder: Path) -> dict[str, Any]:
        found = made.run_file(place, place / name, optim={"lr": 0.05})
        found["run"] = {"name": f"lora-{name}", "dir": str(folder / "runs"), "seed": 1}
        return {**found, "finetune": {"adapter": {"targets": targets, "rank": 2}}}

    return settings


class Net(nn.Module):
    """Convolutions, strided and filled up, and a norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, (2, 3), padding=1)
        self.head = nn.Linear(5, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images)).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


def conv(place: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(2)
    state = {name: torch.randn_like(t) / 3 if t.is_floating_point() else t for name, t in Net().state_dict().items()}
    state["norm.running_var"] = state["norm.running_var"].abs() + 0.5
    save_file(state, folder / "net.safetensors")
    return gpt(
        place,
        run={"name": "conv", "dir": str(folder / "runs")},
        task="classification",
        model={"name": "tests.unit.finetune.test_adapters:Net"},
        data={"name": "digits", "batch_size": 32, "eval": "none"},
        finetune={
            "init_from": str(folder / "net.safetensors"),
            "adapter": {"targets": ["first", "second"], "rank": 2, "train": "head.*"},
        },
    )


def gpt2(place: Path, folder: Path) -> dict[str, Any]:
    """Whose layers hold their weights the other way round, some of them square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 260, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
    torch.manual_seed(4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(folder / "gpt2")
    made._llama_tokenizer(folder / "gpt2")
    found = made.run_file(place, folder / "gpt2", optim={"lr": 0.05})
    found["run"] = {"name": "lora-gpt2", "dir": str(folder / "runs"), "seed": 1}
    return {**found, "finetune": {"adapter": {"targets": ["*.c_attn", "*.c_proj"], "rank": 2}}}


SETTINGS: dict[str, Any] = {
    "gpt2": gpt2,
    "gpt": lambda place, folder: gpt(place, run={"name": "merge", "dir": str(folder / "runs")}),
    "llama": of_folder("llama", ["*.q_proj", "*.v_proj", "*.down_proj"]),
    "bert": of_folder("bert", ["*.query", "*.value"]),
    "conv": conv,
}
INPUTS: dict[str, Any] = {
    "gpt2": lambda place: sample("conversations", path=place / "chats.jsonl", tokenizer=place / "llama", context=95),
    "gpt": lambda place: sample("text", source=place / "text.txt", context=8),
    "llama": lambda place: sample("conversations", path=place / "chats.jsonl", tokenizer=place / "llama", context=95),
    "bert": lambda place: sample("text_classification", path=place / "reviews.csv", tokenizer=place / "bert"),
    "conv": lambda place: sample("digits"),
}


def sample(name: str, **args: Any) -> Any:
    """What a model takes, of the first samples of the run's own data."""
    said = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
    dataset: Any = data.create(name, "train", said)
    batch = next(iter(EvalLoader(dataset, batch_size=3))).data
    return batch["tokens"][:, :-1] if isinstance(batch, dict) else batch[0]


PLAIN: dict[str, Any] = {
    "gpt2": {"pretrained": False},
    "gpt": {},
    "llama": {"pretrained": False},
    "bert": {"pretrained": False},
    "conv": {},
}


def test_merging_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    config = schema.Adapter(targets=("x",), rank=3, alpha=6)
    first, second = torch.randn(3, 5), torch.randn(4, 3)
    weight = torch.randn(4, 5)
    expected = weight + 2 * second @ first
    assert torch.allclose(merged(weight, first, second, config, transposed=False), expected, atol=1e-6)
    assert torch.allclose(merged(weight.T, first, second, config, transposed=True), expected.T, atol=1e-6)


# peft asks transformers for what has another name now.
of_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.slow
@of_peft
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_and_peft_open_what_is_exported(name: str, place: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run = bigtrain.train(SETTINGS[name](place, tmp_path))
    library = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    command("ckpt", "export", str(run.path), str(tmp_path / "whole"), "--to", "hf")
    command("ckpt", "export", str(run.path), str(tmp_path / "adapter"), "--to", "peft")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["base_model_name_or_path"]) == (2, str(place / name))
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 20_000
    inputs = INPUTS[name](place)
    named = inputs if name == "bert" else {"input_ids": inputs}
    with opened(find_checkpoint(run.path)) as trained, trained.evaluating():
        expected = trained.model(inputs)
        whole = library.from_pretrained(tmp_path / "whole").eval()
        beside = peft.PeftModel.from_pretrained(library.from_pretrained(place / name), tmp_path / "adapter").eval()
        assert torch.allclose(whole(**named).logits, expected, atol=1e-5)
        assert torch.allclose(beside(**named).logits, expected, atol=1e-6)
        before = library.from_pretrained(place / name).eval()(**named).logits
        assert not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.slow
@of_peft
def test_a_new_head_trains_beside_the_adapter(place: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    settings = SETTINGS["bert"](place, tmp_path)
    settings["model"] = {"name": f"hf/{place / 'body'}", "args": {"num_classes": 3}}
    settings["finetune"] |= {"new": ["classifier.*"]}
    with pytest.raises(StateError, match=r"begin with initial values and would never train: classifier\.weight"):
        bigtrain.train(settings)
    settings["finetune"]["adapter"]["train"] = ["classifier.*"]
    run = bigtrain.train(settings)
    with open_checkpoint(find_checkpoint(run.path)) as reader:
        assert ("weight", "classifier.weight") in reader.index
        assert "bert.pooler.dense.weight" in reader.extra["base"]["tensors"]
    command("ckpt", "export", str(run.path), str(tmp_path / "adapter"), "--to", "peft")
    base = AutoModelForSequenceClassification.from_pretrained(place / "body", num_labels=3)
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = INPUTS["bert"](place)
    with opened(find_checkpoint(run.path)) as trained, trained.evaluating():
        assert torch.allclose(beside(**inputs).logits, trained.model(inputs), atol=1e-6)


@pytest.mark.slow
def test_an_adapter_starts_from_another(place: Path, tmp_path: Path) -> None:
    first = bigtrain.train(gpt(place, run={"name": "one", "dir": str(tmp_path)}))
    settings = gpt(place, run={"name": "two", "dir": str(tmp_path)}, optim={"lr": 0.0}, train={"steps": 1})
    settings["finetune"]["init_from"] = str(first.path)
    second = bigtrain.train(settings)
    expected = first.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())
    settings["finetune"]["adapter"] |= {"alpha": 2 * (alpha := settings["finetune"]["adapter"]["alpha"])}
    settings["run"]["name"] = "scaled"
    with pytest.raises(StateError, match=f"was trained with alpha {alpha}, and this run has {2 * alpha}"):
        bigtrain.train(settings)
    another = settings["finetune"] | {"ignore": ["*.lora_*"], "new": ["*.lora_*"]}
    bigtrain.train(settings | {"finetune": another})
    del settings["finetune"]["adapter"]
    settings["run"]["name"] = "three"
    with pytest.raises(StateError, match="holds an adapter, and this run has none"):
        bigtrain.train(settings)
    command("ckpt", "export", str(first.path), str(tmp_path / "merged.safetensors"), "--to", "safetensors")
    settings["finetune"] = {"init_from": str(tmp_path / "merged.safetensors")}
    bigtrain.train(settings)


@pytest.mark.slow
def test_what_is_exported_elsewhere(place: Path, tmp_path: Path) -> None:
    run = bigtrain.train(gpt(place, run={"name": "gpt", "dir": str(tmp_path)}))
    for form in ("dcp", "deepspeed"):
        command("ckpt", "export", str(run.path), str(tmp_path / form), "--to", form)
    plain = gpt(place, run={"name": "plain", "dir": str(tmp_path)})
    del plain["finetune"]["adapter"]
    whole = bigtrain.train(plain)
    done = CliRunner().invoke(app, ["ckpt", "export", str(whole.path), str(tmp_path / "none"), "--to", "peft"])
    assert isinstance(done.exception, CheckpointError)
    assert "has no adapter" in str(done.exception)


class Derived(nn.Linear):
    """Computes something else than its base."""


def wrong(**adapter: Any) -> schema.Adapter:
    return schema.Adapter(**{"targets": ("a",), **adapter})


def test_what_cannot_have_an_adapter() -> None:
    plain = {name: nn.Linear(3, 3) for name in "abf"}
    others = {"c": Derived(3, 3), "e": nn.LayerNorm(3)}
    convolutions = {"d": nn.Conv2d(4, 4, 1, groups=2), "g": nn.Conv1d(4, 4, 2, dilation=2)}
    net = nn.ModuleDict({**plain, **others, **convolutions})
    net["b"].weight = net["a"].weight
    cases: list[tuple[dict[str, Any], type[BigtrainError], str]] = [
        ({"targets": ("a",)}, CombinationError, "a shares its weight with another layer"),
        ({"targets": ("c",)}, PatternError, "'c' matches no layer that can have an adapter"),
        ({"targets": ("d",)}, PatternError, "'d' matches no layer"),
        ({"targets": ("g",)}, PatternError, "'g' matches no layer"),
        ({"targets": ("e",)}, PatternError, "'e' matches no layer"),
        ({"targets": ("f",), "train": ("z.*",)}, PatternError, "'z.*' matches no parameter"),
    ]
    for adapter, error, words in cases:
        with pytest.raises(error, match=words.replace(".*", r"\.\*")):
            with_adapter(net, wrong(**adapter))
        assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(PatternError, match="'lm_head' matches no layer"):  # it may return a loss
        with_adapter(models.build("gpt", GPT), wrong(targets=("lm_head",)))


def test_an_adapter_beside_weights_that_were_drawn(place: Path, tmp_path: Path) -> None:
    settings = gpt(place, run={"name": "none", "dir": str(tmp_path)})
    del settings["finetune"]["init_from"]
    with pytest.raises(CombinationError, match="the run begins with none"):
        bigtrain.train(settings)
    settings = made.run_file(place, place / "llama", finetune={"adapter": {"targets": ["*.q_proj"]}})
    settings["model"]["args"] = {"pretrained": False}
    with pytest.raises(CombinationError, match="the run begins with none"):
        bigtrain.train(settings)
    # A factory of one's own may read what it likes.
    own = gpt(place, run={"name": "own", "dir": str(tmp_path)}, finetune={"adapter": {"targets": ["*_proj"]}})
    run = bigtrain.train(own, model=lambda: models.build("gpt", GPT))
    with open_checkpoint(find_checkpoint(run.path)) as reader:
        assert ("weight", "norm.weight") in reader.index


def test_a_module_that_was_given_is_not_changed(place: Path, tmp_path: Path) -> None:
    settings = gpt(place, run={"name": "given", "dir": str(tmp_path)})
    module = models.build("gpt", GPT)
    with pytest.raises(ModelError, match="changed by an adapter"):
        bigtrain.train(settings, model=module)
    run = bigtrain.train(settings, model=lambda: models.build("gpt", GPT))
    assert any(is_adapter(name) for name, _ in run.model.named_parameters())


@pytest.mark.slow
def test_a_folder_that_has_moved(place: Path, tmp_path: Path) -> None:
    """Where its new place is said, a run goes on from it, is measured and exported; else the old one is asked for."""
    shutil.copytree(place / "bert", tmp_path / "here")
    shutil.copy(place / "reviews.csv", tmp_path)
    settings = made.run_file(tmp_path, tmp_path / "here", optim={"lr": 0.05})
    settings["finetune"] = {"adapter": {"targets": ["*.query"]}}
    run = bigtrain.train(settings)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(CheckpointError, match="which cannot be opened"), opened(find_checkpoint(run.path)):
        pass
    assert "samples" in command("eval", str(run.path), f"model.name=hf/{tmp_path / 'there'}", "--json")
    said = command("predict", str(run.path), "so good", "--set", f"model.name=hf/{tmp_path / 'there'}")
    assert said.split()[2] in made.OF_LABEL
    command("ckpt", "export", str(run.path), str(tmp_path / "out"), "--to", "hf", "--base", str(tmp_path / "there"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    settings["model"]["name"] = f"hf/{tmp_path / 'there'}"
    again = bigtrain.train({**settings, "train": {"steps": 6}})
    assert len(losses(again.path)) == 6
