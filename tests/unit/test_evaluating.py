"""`bigtrain eval` and `bigtrain predict` on small trained models, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import precision_recall_fscore_support
from typer.testing import CliRunner

import bigtrain
from bigtrain.cli import app
from bigtrain.errors import BigtrainError, CheckpointError, CombinationError, DataError, StateError, UserError
from bigtrain.evaluating import evaluate, find_checkpoint, opened, predict
from bigtrain.evaluating.predicting import Generating
from tests.helpers import resuming, transfer


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    settings = transfer.config(folder, "digits", list(range(5)), train={"steps": 12})
    return bigtrain.train(settings).path


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigtrain.train(resuming.config(tmp_path_factory.mktemp("gpt"))).path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first ten digits below 5, as PNG files of their own size."""
    folder = tmp_path_factory.mktemp("pictures")
    found = load_digits()
    paths = []
    for number, pixels in enumerate(found.images[found.target < 5][:10]):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(paths[-1])
    return paths


def command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception:
        raise done.exception
    return done.stdout


def test_eval_by_class_is_what_scikit_learn_says(digits: Path) -> None:
    with opened(find_checkpoint(digits)) as trained:
        found = evaluate(trained)
    assert found.metrics["accuracy"] == json.loads((digits / "result.json").read_text())["metrics"]["accuracy"]
    matrix = found.metrics["confusion_matrix"]
    labels, taken = (
        np.repeat(np.indices(matrix.shape)[axis].ravel(), matrix.numpy().ravel()) for axis in (0, 1)
    )  # one entry for each sample
    expected = precision_recall_fscore_support(labels, taken, zero_division=0)
    for number, each in enumerate(found.classes):
        ours = [each.precision or 0, each.recall or 0, each.f1 or 0, each.support]
        assert ours == pytest.approx([column[number] for column in expected])
    assert [each.name for each in found.classes] == list("01234")


def test_eval_as_json_and_on_other_data(digits: Path) -> None:
    said = json.loads(command("eval", str(digits), "--json"))
    assert (said["step"], said["is_same_data"]) == (12, True)
    other = command("eval", "digits", "--dir", str(digits.parent), "--data", "eval={split: 0.5}")
    assert "not those" in other
    assert "confusion matrix" in other


def test_data_of_other_classes_are_refused(digits: Path) -> None:
    changes = ["data.args={size: 16, classes: [1, 2, 3, 4, 0]}"]
    words = "the model knows the classes '0', '1', .* and the data have '1', '2'"
    with opened(find_checkpoint(digits), changes) as trained, pytest.raises(DataError, match=words):
        evaluate(trained)


def test_a_run_that_there_is_not(digits: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run or checkpoint digit ") as caught:
        find_checkpoint("digit ", digits.parent)
    assert caught.value.remedy == "did you mean digits?"


def test_a_run_that_has_saved_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "early" / "attempts").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_checkpoint("early", tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(CheckpointError, match="there is no run or checkpoint"):
        find_checkpoint(tmp_path / "pictures")


def test_perplexity(gpt: Path) -> None:
    said = json.loads(command("eval", str(gpt), "--json", "--data", "eval={split: 0.5}"))
    assert said["metrics"]["perplexity"] == pytest.approx(np.exp(said["metrics"]["loss"]))
    with pytest.raises(DataError, match="no data to evaluate on"):
        command("eval", str(gpt))


def test_pictures_get_the_class_of_the_samples_they_are(digits: Path, pictures: list[str]) -> None:
    with opened(find_checkpoint(digits)) as trained:
        answers = [answer.answer for answer in predict(trained, pictures)]
        images = torch.from_numpy(load_digits().images[load_digits().target < 5][:10]).float()[:, None]
        with trained.evaluating():
            shares = trained.model((images / 16 - 0.3053) / 0.3760).softmax(1)
    for answer, share in zip(answers, shares, strict=True):
        assert answer["label"] == int(share.argmax())
        assert answer["probability"] == pytest.approx(float(share.max()), abs=0.01)  # 16 levels as 256
    rows = list(csv.DictReader(io.StringIO(command("predict", str(digits), *pictures, "--csv"))))
    assert [row["class"] for row in rows] == [answer["class"] for answer in answers]


def test_a_folder_of_pictures_goes_through_the_transforms(tmp_path: Path, pictures: list[str]) -> None:
    for number, path in enumerate(pictures):
        (tmp_path / "in" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(tmp_path / "in" / f"c{number % 2}" / f"{number}.png")
    settings = transfer.config(tmp_path, "folder", [0, 1], train={"steps": 2})
    settings["data"] |= {"name": "image_folder", "args": {"root": str(tmp_path / "in")}, "batch_size": 4}
    settings["data"]["transforms"] = {"train": ["Grayscale"], "eval": ["Grayscale"]}
    run = bigtrain.train(settings)
    Image.new("RGBA", (31, 17)).save(tmp_path / "large.png")
    with opened(find_checkpoint(run.path)) as trained:
        answers = list(predict(trained, [str(tmp_path / "in" / "c1" / "1.png"), str(tmp_path / "large.png")]))
    assert {answer.answer["class"] for answer in answers} <= {"c0", "c1"}
    # The same on a machine that has the checkpoint alone; what could not be compared with the data is compared here.
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    picture = str(tmp_path / "elsewhere" / "c1" / "1.png")
    with opened(find_checkpoint(run.path)) as trained:
        assert [answer.answer for answer in predict(trained, [picture])] == [answers[0].answer]
        with pytest.raises(DataError, match=r"becomes \(1, 17, 31\), and the first one \(1, 8, 8\)"):
            list(predict(trained, [picture, str(tmp_path / "large.png")]))
        trained.model.forward = lambda images: images.view(7)
        with pytest.raises(DataError, match=r"the model does not take pictures of \(1, 8, 8\)") as caught:
            list(predict(trained, [picture]))
    assert str(tmp_path / "in") in caught.value.remedy


def test_a_folder_of_pictures_is_all_that_are_in_it(digits: Path, pictures: list[str], tmp_path: Path) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    for number, path in enumerate(pictures):
        Image.open(path).save(tmp_path / "in" / ("more" if number else "") / f"{number}.{'PNG' if number else 'jpg'}")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    with opened(find_checkpoint(digits)) as trained:
        answers = list(predict(trained, [f"{tmp_path}/in", pictures[0]]))
        assert [answer.input for answer in answers] == [
            *sorted(str(path) for path in (tmp_path / "in").rglob("*.*") if path.suffix != ".txt"),
            pictures[0],
        ]
        assert len(answers) == len(pictures) + 1


def test_a_text_goes_on_as_the_model_says(gpt: Path) -> None:
    with opened(find_checkpoint(gpt)) as trained:
        (answer,) = predict(trained, ["the"], Generating(max_tokens=6))
        seen = list(b"the")
        for _ in range(6):
            with trained.evaluating():
                seen.append(int(trained.model(torch.tensor([seen[-4:]]))[0, -1].argmax()))
        assert answer.answer["continuation"].encode() == bytes(seen[3:])
        drawn = Generating(max_tokens=9, temperature=2.0, seed=5)
        first, again = (list(predict(trained, ["the"], drawn)) for _ in range(2))
        assert first == again
        others = [next(predict(trained, ["the"], Generating(9, 2.0, seed))).answer["continuation"] for seed in range(5)]
        assert len(Counter(others)) > 1


def test_a_prompt_from_a_file(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "it.txt").write_text("fox")
    said = json.loads(command("predict", str(gpt), f"@{tmp_path}/it.txt", "--max-tokens", "2", "--json"))
    assert said[0]["input"] == "fox"


@pytest.mark.parametrize(
    ("text", "words"), [("longer", "6 tokens"), ("", "0 tokens"), ("@nowhere.txt", "there is no 'nowhere.txt'")]
)
def test_prompts_that_do_not_fit(gpt: Path, text: str, words: str) -> None:
    with opened(find_checkpoint(gpt)) as trained, pytest.raises(DataError, match=words):
        list(predict(trained, [text]))


def test_files_that_are_no_pictures(digits: Path, pictures: list[str], tmp_path: Path) -> None:
    (tmp_path / "it.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    (tmp_path / "none").mkdir()
    with opened(find_checkpoint(digits)) as trained:
        for name, words in [
            ("it.png", "no picture"),
            ("cut.png", "no picture"),
            ("gone.png", "there is no"),
            ("none", "holds no pictures"),
        ]:
            with pytest.raises(DataError, match=words):
                list(predict(trained, [str(tmp_path / name)]))


def test_what_cannot_be_opened(digits: Path, tmp_path: Path) -> None:
    wrong: list[tuple[list[str], type[BigtrainError], str]] = [
        (["model.args.num_classes=4"], StateError, "different: weight head.weight"),
        (["model.name=given:Net"], CombinationError, "as an object"),
    ]
    for overrides, error, words in wrong:
        with pytest.raises(error, match=words), opened(find_checkpoint(digits), overrides):
            pass
    with pytest.raises(CheckpointError, match="no run or checkpoint"), opened(find_checkpoint(tmp_path / "gone")):
        pass


def test_a_task_that_predicts_nothing(digits: Path) -> None:
    changes: list[Any] = ["task=regression"]
    with opened(find_checkpoint(digits), changes) as trained, pytest.raises(UserError, match="cannot predict"):
        predict(trained, ["x"])
