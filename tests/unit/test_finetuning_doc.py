"""The recipes of docs/finetuning.md are whole run files, short, and each runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bigtrain
from bigtrain.config.loader import load
from bigtrain.evaluating import find_checkpoint, opened, predict
from bigtrain.evaluating.texts import Generating
from tests.helpers import hugging_face as made

TEXT = (Path(__file__).parents[2] / "docs/finetuning.md").read_text()
RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def test_recipes_are_short_and_valid(tmp_path):
    assert len(RECIPES) == 11  # the ten, and what the first starts from
    for number, recipe in enumerate(RECIPES):
        assert len(recipe.splitlines()) < 30
        (tmp_path / f"{number}.yaml").write_text(recipe)
        load(tmp_path / f"{number}.yaml")


def prepare(folder: Path) -> None:
    """The files that recipes 4 to 8 start from."""
    made.llama(folder / "llama", hidden_size=32, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False)
    made.bert(folder / "bert", kind="BertModel")
    made.reviews(folder / "reviews.csv")
    made.chats(folder / "chats.jsonl")
    (folder / "README.md").write_text("Nothing is lost: kill it, and it goes on. " * 40)
    conv = torch.nn.Conv2d(3, 32, 3)
    save_file({f"backbone.conv.{n}": t for n, t in conv.state_dict().items()}, folder / "weights.safetensors")


@pytest.mark.slow
def test_recipes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    for number, recipe in enumerate(RECIPES):
        (tmp_path / f"{number}.yaml").write_text(recipe)
        faster = ["data.batch_size=256"] if "resnet" in recipe else []
        run = bigtrain.train(tmp_path / f"{number}.yaml", [*faster, "engine.device=cpu", "track.progress=none"])
        if number:
            report = json.loads((run.path / "init_report.json").read_text())
            assert report["loaded"] or report["remapped"]
            assert all(name.startswith(("fc.", "head.", "classifier.")) for name in report["new"])
    with opened(find_checkpoint("runs/assistant")) as trained:
        (answer,) = predict(trained, ["a fox"], Generating(max_tokens=3))
        assert "answer" in answer.answer
    rows = [json.loads(line) for line in Path("runs/gradual/metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows if row.get("event") == "phase proved"} == {0, 1, 2}
