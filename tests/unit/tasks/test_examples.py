"""Sample predictions: which are shown, and that the pictures are PNGs that another library reads."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bigtrain
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.pictures import data_uri
from tests.unit.tracking.test_making import config


def read(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back(channels: int) -> None:
    pixels = torch.randint(256, (channels, 5, 7))
    pixels[0, 0, :2] = torch.tensor([0, 255])  # the darkest and the brightest there can be
    back = read(data_uri(pixels / 255 * 3 - 1))
    expected = pixels.permute(1, 2, 0).numpy()
    assert (back == (expected[..., 0] if channels == 1 else expected)).all()
    assert read(data_uri(torch.zeros(1, 2, 2))).max() == 0


def test_mistakes_come_first_and_fillers_do_not_count() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 0, 3, 3])] * 5
    labels = torch.tensor([0, 1, 3, 1, 3, 0])
    batch = Batch((torch.rand(6, 1, 4, 4), labels), torch.ones(6), num_valid=5)
    found = Classification().examples(LossSum(torch.zeros(()), 5.0, logits, labels), batch, 4)
    assert [(each["prediction"], each["target"]) for each in found] == [(2, 3), (0, 1), (0, 0), (1, 1)]
    assert found[0]["confidence"] == pytest.approx(logits.softmax(1)[2].max().item(), abs=1e-4)
    flat = Batch((torch.rand(6, 16), labels), torch.ones(6), num_valid=6)
    assert Classification().examples(LossSum(torch.zeros(()), 6.0, logits, labels), flat, 4) == []


def test_a_run_keeps_some_of_its_last_evaluation(tmp_path: Path) -> None:
    run = bigtrain.train(config(tmp_path), ["data.eval.split=0.4"])
    kept = json.loads((run.path / "samples.json").read_text())
    assert len(kept) == 8  # of 20 samples
    assert read(kept[0]["image"]).shape == (32, 32, 3)
    assert kept[0]["image"] in (run.path / "report.html").read_text()
    assert {each["target"] for each in kept} <= set(range(10))
