"""Classes weighted by how rare they are, and how each is met: in eval, in the report, in the run file for scans."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from typer.testing import CliRunner

import bigtrain
from bigtrain.cli import app
from bigtrain.config.loader import load
from bigtrain.data import build
from bigtrain.data.labels import labels_of
from bigtrain.errors import DataError, UserError
from bigtrain.tasks import build as build_task
from bigtrain.tasks.classification import Classification
from bigtrain.trainer import show_labels

ROOT = Path(__file__).parents[3]
COUNTS = {"benign": 40, "malignant": 8, "unclear": 12}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures of three kinds, dark, grey and bright; the rare one is the bright one."""
    folder = tmp_path_factory.mktemp("scans")
    draw = np.random.RandomState(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for index in range(count):
            pixels = draw.randint(0, 60, (24, 24)) + {"benign": 0, "unclear": 80, "malignant": 190}[name]
            Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / name / f"{index:03}.png")
    return folder


def test_balanced_weights_are_scikit_learns(scans):
    sets = build("image_folder", {"root": str(scans)}, evaluation=0.2)
    labels = labels_of(sets.train)
    assert len(labels) == len(sets.train) == 48
    assert [sets.train[place][1] for place in range(48)] == labels.tolist()  # through the part that is held out
    task = build_task("classification", {"class_weights": "balanced"})
    show_labels(task, sets)
    assert task.class_weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))


def test_labels_of_digits_of_others_and_of_none():
    labels = labels_of(build("digits", {"classes": [3, 5]}).train)
    assert set(labels.tolist()) == {0, 1}
    with pytest.raises(DataError, match="does not tell the labels"):
        labels_of(build("synthetic", {"kind": "classification"}).train)


def test_what_cannot_be_balanced_is_refused(scans):
    task = Classification(class_weights="balanced", num_classes=4)
    with pytest.raises(DataError, match="class 3 has no samples to train on"):
        task.see_labels(np.array([0, 1, 2, 2]), None)
    task = Classification(class_weights="balanced", ignore_index=1)
    with pytest.raises(DataError, match="class b has no samples"):
        task.see_labels(np.array([0, 1, 2, 2]), ["a", "b", "c"])
    for wrong in ("balance", ["a"], {}):
        with pytest.raises(UserError, match=r"class_weights is|among the class weights"):
            Classification(class_weights=wrong)


VIT = "{image_size: 24, patch_size: 8, num_layers: 1, num_heads: 2, hidden_dim: 16, mlp_dim: 32, num_classes: 3}"


@pytest.mark.parametrize(("model", "args"), [
    (f"{__name__}:small", "{num_classes: 3}"), ("torchvision.models.vision_transformer:VisionTransformer", VIT),
])  # fmt: skip
def test_the_run_file_for_scans_weighs_and_finds_the_rare(scans, tmp_path, monkeypatch, model, args):
    """As it stands, but for smaller pictures, a smaller model and weights from a run instead of torchvision's."""
    monkeypatch.chdir(tmp_path)
    small = [
        *(f"data.args.root={scans}", "data.batch_size=16", "engine.device=cpu", "track.progress=none"),
        *("train.epochs=6", "optim.lr=0.01", "optim.schedule.warmup_steps=1", "optim.ema.decay=0.5", "run.name=run"),
        *(f"data.transforms.{split}.0.args.size=[24, 24]" for split in ("train", "eval")),
        *(f"model={{name: '{model}', args: {args}}}", "finetune.init_from=null"),
    ]
    assert load(ROOT / "configs/medical_images.yaml").config.finetune.init_from == "torchvision/IMAGENET1K_V1"
    run = bigtrain.train(ROOT / "configs/medical_images.yaml", small)
    shown = json.loads(CliRunner().invoke(app, ["eval", "run", "--best", "--json"]).stdout)
    assert [each["name"] for each in shown["classes"]] == list(COUNTS)
    best = json.loads((run.path / "result.json").read_text())["best"]
    assert best["metric"] == "recall"
    assert shown["metrics"]["recall"] == best["value"]
    recalls = {each["name"]: each["recall"] for each in shown["classes"]}
    assert recalls["malignant"] == max(recalls.values()) > 0.9  # one in eight, and it is found
    page = (run.path / "report.html").read_text()
    assert "By class" in page
    assert all(f"<td>{name}</td>" in page for name in COUNTS)


def small(*, num_classes: int) -> nn.Module:
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(4, num_classes))


def test_the_report_lists_the_worst_class_first():
    from bigtrain.report.results import by_class

    metrics = {"confusion_matrix": [[8, 2, 0], [1, 1, 2], [0, 0, 0]]}
    run = SimpleNamespace(result={"metrics": metrics, "class_names": ["a", "b<", "c"]})
    rows = by_class(run).split("<tr>")[2:]
    assert [row.partition("</td>")[0] for row in rows] == ["<td>b&lt;", "<td>a", "<td>c"]
    assert ">0.2500<" in rows[0]  # recall 1 of 4
    assert ">0.3333<" in rows[0]  # precision 1 of 3
    assert ">0.2857<" in rows[0]  # 2 / (4 + 3)
    assert rows[2].count("–") == 1  # no recall of a class that was never there; taken for it were two, wrongly
