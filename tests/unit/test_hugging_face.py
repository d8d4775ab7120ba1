"""A folder that transformers wrote is loaded, trained, measured, asked, exported, and opened by transformers again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bigtrain
from bigtrain.checkpoint import open_checkpoint
from bigtrain.cli import app
from bigtrain.doors.exporting import export
from bigtrain.errors import BigtrainError, CheckpointError, DataError, ModelError, StateError, UserError
from bigtrain.evaluating import find_checkpoint, opened
from bigtrain.trainer import build_data
from tests.helpers import hugging_face as made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a BERT and a Llama, and data for them."""
    folder = tmp_path_factory.mktemp("hf")
    made.bert(folder / "bert")
    made.llama(folder / "llama")
    made.reviews(folder / "reviews.csv")
    made.chats(folder / "chats.jsonl")
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    """A run of each, in this process."""
    return {name: bigtrain.train(made.run_file(place, place / name)).path for name in ("bert", "llama")}


def command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_starts_from_the_weights_of_the_folder(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokens = torch.randint(4, 17, (3, 9))
    for name, theirs in (("bert", AutoModelForSequenceClassification), ("llama", AutoModelForCausalLM)):
        settings = made.run_file(
            place, place / name, optim={"lr": 0.0}, run={"name": f"still-{name}", "dir": str(place)}
        )
        ours = bigtrain.train(settings, ["train.steps=1"]).model.eval()
        with torch.no_grad():
            found: Any = ours({"input_ids": tokens} if name == "bert" else tokens)
            expected = theirs.from_pretrained(place / name).eval()(input_ids=tokens).logits
        assert torch.equal(found, expected)
        assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_exported_is_opened_again_with_equal_logits(
    name: str, place: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    command("ckpt", "export", str(runs[name]), str(tmp_path / "out"), "--to", "hf")
    library = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    theirs, before = (library.from_pretrained(path).eval() for path in (tmp_path / "out", place / name))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("the film was good" if name == "bert" else "a fox", return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with opened(find_checkpoint(runs[name])) as trained, trained.evaluating():
        ours = trained.model(inputs if name == "bert" else inputs["input_ids"])
        assert torch.equal(theirs(**inputs).logits, ours)
        assert not torch.allclose(before(**inputs).logits, ours, atol=1e-3)
    if name == "bert":
        assert theirs.config.id2label == {0: "mid", 1: "neg", 2: "pos"}
    else:
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        assert tokenizer.chat_template == made.CHAT_TEMPLATE


def test_an_export_starts_another_run(place: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(find_checkpoint(runs["llama"])) as reader:
        export(reader, tmp_path / "again", "hf")
    run = bigtrain.train(made.run_file(place, tmp_path / "again", train={"steps": 1}))
    assert json.loads((run.path / "init_report.json").read_text())["coverage"] == 1


def test_a_new_head_is_declared(place: Path) -> None:
    made.bert(place / "body", kind="BertModel")  # as AutoModel saves it: names without `bert.`
    settings = made.run_file(place, place / "body", train={"steps": 1})
    with pytest.raises(ModelError, match="is of BertModel: its head is to be said"):
        bigtrain.train(settings)
    settings["model"]["args"] = {"head": "classification"}
    with pytest.raises(ModelError, match="does not know how many classes"):
        bigtrain.train(settings)
    settings["model"] = {"name": f"hf/{place / 'body'}", "args": {"num_classes": 3}}
    with pytest.raises(StateError, match=r"classifier\.weight is not in the file"):
        bigtrain.train(settings)
    settings["finetune"] = {"new": ["classifier.*"]}
    report = json.loads((bigtrain.train(settings).path / "init_report.json").read_text())
    assert report["new"] == ["classifier.weight", "classifier.bias"]
    assert report["remapped"]["bert.pooler.dense.weight"] == "pooler.dense.weight"
    assert report["ignored"] == []


def test_weights_of_a_folder_that_says_something_else(place: Path, tmp_path: Path) -> None:
    """Heads are in no tensor's shape: the weights would fit, and compute something else."""
    shutil.copytree(place / "llama", other := tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    described |= {"num_attention_heads": 2 * described["num_attention_heads"], "head_dim": described["head_dim"] // 2}
    described |= {"num_key_value_heads": 2 * described["num_key_value_heads"]}
    (other / "config.json").write_text(json.dumps(described))
    settings = made.run_file(place, place / "llama", run={"name": "other", "dir": str(tmp_path / "runs")})
    settings["finetune"] = {**settings.get("finetune", {}), "init_from": str(other)}
    with pytest.raises(StateError, match=r"num_attention_heads is \d there and \d here") as caught:
        bigtrain.train(settings, ["train.steps=1"])
    assert caught.value.remedy.startswith("say what is meant: model.args.config: {num_attention_heads: …")
    assert not (tmp_path / "runs").exists()
    own = json.loads((place / "llama" / "config.json").read_text())
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    settings["model"] = {**settings["model"], "args": {"config": {key: own[key] for key in keys}}}
    bigtrain.train(settings, ["train.steps=1"])


def test_names_that_the_first_berts_have(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "bert", old := tmp_path / "bert")
    (old / "model.safetensors.index.json").unlink()
    weights = {}
    for shard in old.glob("*.safetensors"):
        weights |= load_file(shard)
        shard.unlink()
    for ours, theirs in {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    assert any(name.endswith("gamma") for name in weights)
    save_file(weights, old / "model.safetensors")
    losses = []
    for name, folder in (("new", place / "bert"), ("old", old)):
        settings = made.run_file(place, folder, run={"name": name, "dir": str(tmp_path)}, optim={"lr": 0.0})
        losses.append(bigtrain.train(settings, ["train.steps=1"]).evaluation["loss"])
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapters_folder_is_no_model(place: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    settings = made.run_file(place, place / "llama", run={"name": "adapter", "dir": str(tmp_path / "runs")})
    for place_of_adapter in ("adapter", "adapter/adapter_model.safetensors", "alone"):
        if place_of_adapter == "alone":  # as it is where only the large file was copied
            (tmp_path / "adapter/adapter_config.json").unlink()
            (tmp_path / "adapter").rename(tmp_path / "alone")
        settings["finetune"] = {**settings.get("finetune", {}), "init_from": str(tmp_path / place_of_adapter)}
        with pytest.raises(BigtrainError, match="holds an adapter of peft, and not the model"):
            bigtrain.train(settings)


def test_another_number_of_classes_replaces_the_head(place: Path) -> None:
    rows = [{"text": "the film", "label": word} for word in ("a", "b", "c", "d")] * 4
    made.write_rows(place / "four.jsonl", rows)
    settings = made.run_file(place, place / "bert", run={"name": "four", "dir": str(place / "runs")})
    settings["data"]["args"]["path"] = str(place / "four.jsonl")
    with pytest.raises(DataError, match="4 classes and the model 3 outputs: the head does not know 'd'") as caught:
        bigtrain.train(settings)
    assert caught.value.remedy.endswith("'a', 'b', 'c', 'd'")
    settings["model"]["args"] = {"num_classes": 4}
    run = bigtrain.train(settings)
    assert json.loads((run.path / "init_report.json").read_text())["head"] == ["classifier", 3]


def test_without_its_weights_it_begins_as_transformers_would(place: Path) -> None:
    settings = made.run_file(place, place / "llama", optim={"lr": 0.0}, run={"name": "fresh", "dir": str(place)})
    settings["model"]["args"] = {"pretrained": False}
    run = bigtrain.train(settings, ["train.steps=1"])
    assert not (run.path / "init_report.json").exists()
    assert run.model.get_parameter("lm_head.weight").std().item() == pytest.approx(0.02, rel=0.2)


def test_evaluation_and_predictions(place: Path, runs: dict[str, Path]) -> None:
    said = json.loads(command("eval", str(runs["bert"]), "--json"))
    assert [each["name"] for each in said["classes"]] == ["mid", "neg", "pos"]
    assert said["is_same_data"]
    last = json.loads((runs["bert"] / "result.json").read_text())["metrics"]
    assert said["metrics"]["accuracy"] == last["accuracy"]
    other = made.reviews(place / "other.jsonl", 9)
    said = json.loads(
        command(
            "eval",
            str(runs["bert"]),
            "--json",
            "--data",
            f"eval={{name: text_classification, args: {{path: {other}}}}}",
        )
    )
    assert said["samples"] == 9
    rows = json.loads(command("predict", str(runs["bert"]), "the film was good", "bad", "--json"))
    from transformers import AutoTokenizer

    with opened(find_checkpoint(runs["bert"])) as trained, trained.evaluating():
        ids = torch.tensor([AutoTokenizer.from_pretrained(place / "bert")("bad")["input_ids"]])
        shares = trained.model({"input_ids": ids}).softmax(1)[0]
    assert rows[1]["class"] == ["mid", "neg", "pos"][int(shares.argmax())]
    assert rows[1]["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
    assert command("predict", str(runs["bert"]), "bad", "--csv").splitlines()[0] == "input,class,probability,label"


def test_a_model_of_conversations_answers(place: Path) -> None:
    """What it was taught to the letter it says, and then ends."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    made.write_rows(place / "one.jsonl", [row] * 4)
    settings = made.run_file(place, place / "llama", train={"steps": 40}, optim={"lr": 0.03})
    settings |= {"run": {"name": "one", "dir": str(place / "runs")}}
    settings["data"] |= {"args": {"path": str(place / "one.jsonl"), "context": 40}, "eval": "none"}
    run = bigtrain.train(settings)
    assert json.loads(command("predict", str(run.path), "hi", "--max-tokens=20", "--json")) == [
        {"input": "hi", "answer": "yo", "tokens": 2}
    ]


def test_evaluation_knows_the_classes_of_training(place: Path) -> None:
    few = made.write_rows(place / "few.csv", [{"text": "so good", "label": "pos"}])
    settings = made.run_file(place, place / "bert", run={"name": "few", "dir": str(place / "runs")})
    settings["data"]["eval"] = {"name": "text_classification", "args": {"path": str(few)}}
    run = bigtrain.train(settings)
    assert list(run.evaluation["confusion_matrix"].shape) == [3, 3]
    made.write_rows(few, [{"text": "so good", "label": "great"}])
    settings["run"]["name"] = "fewer"
    with pytest.raises(DataError, match="'great' is none of the 3") as caught:
        bigtrain.train(settings)
    assert caught.value.where == f"{few}:2"


def test_classes_in_another_order_than_the_heads(place: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    command("ckpt", "export", str(runs["bert"]), str(tmp_path / "named"), "--to", "hf")
    settings = made.run_file(place, tmp_path / "named", run={"name": "order", "dir": str(tmp_path)})
    settings["data"]["args"]["labels"] = ["pos", "neg", "mid"]
    with pytest.raises(DataError, match="the model's own head has mid, neg, pos"):
        bigtrain.train(settings)


def test_rows_are_filled_up_with_what_the_model_takes_for_it(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made.llama(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "llama")  # config.json still says none: transformers takes the end of a text
    settings = made.run_file(
        place, tmp_path / "llama", run={"name": "filled", "dir": str(tmp_path)}, task="text_classification"
    )
    settings["model"]["args"] = {"num_classes": 3}
    settings["data"] |= {"name": "text_classification", "args": {"path": str(place / "reviews.csv"), "max_tokens": 60}}
    settings["finetune"] = {"new": ["score.*"]}
    with pytest.raises(DataError, match="fills rows up with token 2, and the model takes 1") as caught:
        bigtrain.train(settings)
    assert caught.value.remedy == "set model.args.config: {pad_token_id: 2}"
    settings["model"]["args"]["config"] = {"pad_token_id": 2}
    with opened(find_checkpoint(bigtrain.train(settings, ["train.steps=1"]).path)) as trained, trained.evaluating():
        data = build_data(trained.config).train.base
        texts = [data[index] for index in range(8)]
        alone = torch.cat([trained.model(data.collate([text])[0]) for text in texts])
        torch.testing.assert_close(trained.model(data.collate(texts)[0]), alone)


def test_a_freeze_plan_leaves_frozen_weights_in_the_folder(place: Path) -> None:
    settings = made.run_file(place, place / "llama", run={"name": "top", "dir": str(place / "runs")})
    settings["finetune"] = {"freeze_depth": 1, "layer_decay": 0.5}
    settings["checkpoint"] = {"weights": "trainable", "every_steps": 2}
    run = bigtrain.train(settings)
    with open_checkpoint(find_checkpoint(run.path)) as reader:
        left = set(reader.extra["base"]["tensors"])
    assert "model.layers.0.mlp.up_proj.weight" in left
    assert "model.layers.1.mlp.up_proj.weight" not in left
    with opened(find_checkpoint(run.path)) as trained:
        ours, expected = trained.model.state_dict(), run.model.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_an_export_says_what_its_numbers_are(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = made.run_file(place, place / "llama", run={"name": "fp64", "dir": str(place / "runs")})
    run = bigtrain.train({**settings, "precision": "fp64", "train": {"steps": 1}})
    command("ckpt", "export", str(run.path), str(tmp_path / "out"), "--to", "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float64


def test_a_folder_that_is_not_there(place: Path) -> None:
    settings = made.run_file(place, place / "bert", run={"name": "gone", "dir": str(place / "runs")})
    settings["model"]["name"] = f"hf/{place / 'brt'}"
    with pytest.raises(ModelError, match="there is no folder"):  # not: no tokenizer
        bigtrain.train(settings)
    made.bert(place / "bare")
    for file in (place / "bare").glob("model*"):
        file.unlink()
    settings["model"]["name"] = f"hf/{place / 'bare'}"
    with pytest.raises(UserError, match="holds no weights") as caught:
        bigtrain.train(settings)
    assert "pretrained=false" in caught.value.remedy
    assert not (place / "runs" / "gone").exists()


def test_what_is_trained_needs_the_folders_weights_no_more(place: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    bare = made.bert(tmp_path / "bare")
    for file in bare.glob("model*"):
        file.unlink()
    assert json.loads(command("eval", str(runs["bert"]), f"model.name=hf/{bare}", "--json"))["is_same_data"]
    command("ckpt", "export", str(runs["bert"]), str(tmp_path / "out"), "--to", "hf", "--base", str(bare))


def test_a_tokenizer_of_another_model(place: Path) -> None:
    settings = made.run_file(place, place / "bert", run={"name": "other", "dir": str(place / "runs")})
    settings["data"]["args"] |= {"tokenizer": str(place / "llama"), "max_tokens": 20}
    with pytest.raises(DataError, match="outside the model's vocabulary of 64"):
        bigtrain.train(settings)


def test_plain_text_by_the_folders_tokenizer(place: Path) -> None:
    (place / "it.txt").write_text("the quick brown fox. " * 40)
    settings = made.run_file(place, place / "llama", run={"name": "text", "dir": str(place / "runs")})
    args = {"source": str(place / "it.txt"), "context": 32, "attend_across_documents": False}
    settings["data"] |= {"name": "text", "args": args}
    run = bigtrain.train(settings)
    (said,) = json.loads(command("predict", str(run.path), "the q", "--max-tokens=3", "--json"))
    assert (said["input"], said["tokens"]) == ("the q", 3)


def test_a_checkpoint_of_another_model_is_no_folder(tmp_path: Path) -> None:
    settings = {
        "run": {"name": "cnn", "dir": str(tmp_path)}, "task": "classification", "model": "simple_cnn",
        "data": {"name": "synthetic", "args": {"kind": "classification", "samples": 8}, "eval": "none"},
        "train": {"steps": 1}, "engine": {"device": "cpu"}, "track": {"progress": "none"},
    }  # fmt: skip
    with open_checkpoint(find_checkpoint(bigtrain.train(settings).path)) as reader, pytest.raises(CheckpointError):
        export(reader, tmp_path / "out", "hf")
