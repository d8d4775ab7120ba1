"""Labelled texts from CSV and JSONL: what is read, how batches are filled up, and how a file can be wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import data
from bigtrain.data import TrainLoader
from bigtrain.errors import DataError
from tests.helpers import hugging_face as made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer."""
    return made.bert(tmp_path_factory.mktemp("tokenizer") / "bert")


def load(folder: Path, path: Path, **args: Any) -> Any:
    return data.create("text_classification", "train", {"path": str(path), "tokenizer": str(folder), **args})


def test_csv_and_jsonl_hold_the_same(folder: Path, tmp_path: Path) -> None:
    first = load(folder, made.reviews(tmp_path / "it.csv", 9))
    second = load(folder, made.reviews(tmp_path / "it.jsonl", 9))
    assert first.fingerprint() == second.fingerprint()
    assert first.class_names == ["mid", "neg", "pos"]
    assert load(folder, made.reviews(tmp_path / "it.csv", 12)).fingerprint() != first.fingerprint()


def test_batches_are_what_transformers_makes_of_the_texts(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = made.write_rows(
        tmp_path / "it.csv",
        [{"a": 'the film, "so"\nit is', "b": "good", "y": "1"}, {"a": "bad", "b": "is it the plot", "y": "0"}],
    )
    library = AutoTokenizer.from_pretrained(folder)
    alone, pairs = (load(folder, path, text=text, label="y") for text in ("a", ["a", "b"]))
    texts, others, how = ['the film, "so"\nit is', "bad"], ["good", "is it the plot"], {"return_tensors": "pt"}
    for dataset, expected in (
        (alone, library(texts, padding=True, **how)),
        (pairs, library(texts, others, padding=True, **how)),
    ):
        inputs, labels = dataset.collate([dataset[0], dataset[1]])
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
        assert labels.tolist() == [1, 0]


def test_full_rows_for_compiling(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, made.reviews(tmp_path / "it.csv", 6), padding="full", max_tokens=20)
    for batch in TrainLoader(dataset, batch_size=2).steps():
        assert batch.microbatches[0].data[0]["input_ids"].shape == (2, 20)
        break


def test_longer_texts_are_cut_and_that_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "the " * n, "label": n % 2} for n in (3, 4, 5, 6)]
    with caplog.at_level(logging.WARNING):
        dataset = load(folder, made.write_rows(tmp_path / "it.jsonl", rows), max_tokens=6)
    assert "2 of 4 texts are longer than data.args.max_tokens, 6" in caplog.text
    assert [len(dataset[n][0]["input_ids"]) for n in range(4)] == [5, 6, 6, 6]


def test_classes_in_the_order_that_was_given(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, made.reviews(tmp_path / "it.csv", 3), labels=["pos", "neg", "mid", "other"])
    assert [int(dataset[n][1]) for n in range(3)] == [2, 1, 0]
    assert dataset.num_classes == 4


def test_whole_numbers_are_classes_by_their_size(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "so", "label": number} for number in (10, 9, 2)]
    dataset = load(folder, made.write_rows(tmp_path / "it.csv", rows))
    assert dataset.class_names == ["2", "9", "10"]
    assert [int(dataset[n][1]) for n in range(3)] == [2, 1, 0]


def test_workers_read_the_same(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = load(folder, made.reviews(tmp_path / "it.csv", 10))
    seen = []
    for workers in (0, 1):
        loader = TrainLoader(dataset, batch_size=4, workers=workers)
        step = next(loader.steps())
        seen.append(step.microbatches[0].data[0]["input_ids"])
        loader.close()
    assert torch.equal(*seen)
    assert "forked" not in capfd.readouterr().err  # tokenizers would warn


HEAD = b"text,label\nthe film,pos\n"


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", 1, "no line of column names"),
        (b"txt,label\nx,y\n", 1, "there is no column 'text'"),
        (b"text,label,text\nx,y,z\n", 1, "'text' is there twice"),
        (HEAD + b"\nbad,neg\n", 3, "the row is empty"),
        (HEAD + b"bad\nbad,neg\n", 3, "the row has 1 fields, and there are 2 columns"),
        (HEAD + b"bad,neg,more\nbad,neg\n", 3, "the row has 3 fields"),
        (HEAD + b"bad,\nbad,neg\n", 3, "the label 'label' is empty"),
        (HEAD + b"  ,neg\nbad,neg\n", 3, "'text' is empty"),
        (HEAD + b'"bad,neg\nbad,neg\n', 3, "the row that begins here cannot be read"),
        (HEAD + b'"bad"x,neg\nbad,neg\n', 3, "the row that begins here cannot be read"),
        (HEAD + b"b\xffd,neg\n", 3, "not UTF-8"),
        (HEAD + b'"two\nlines",neg\nbad\n', 5, "the row has 1 fields"),
        (HEAD + b"bad,neg\nbad,neg \n", 4, "the label 'neg ' has spaces at its ends"),
        (HEAD + b"bad,nge\nbad,neg\n", 3, "the label 'nge' is none of the 2"),
    ],
)
def test_what_is_wrong_in_csv_is_named_with_its_line(
    folder: Path, tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    (tmp_path / "it.csv").write_bytes(content)
    labels = {"labels": ["pos", "neg"]} if "none of" in words else {}
    with pytest.raises(DataError, match=words) as caught:
        load(folder, tmp_path / "it.csv", **labels)
    assert caught.value.where == f"{tmp_path / 'it.csv'}:{line}"
    assert caught.value.remedy


GOOD = b'{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (GOOD + b"\n" + GOOD, 2, "the row is empty"),
        (GOOD + b'{"text": "a", "label": 1\n' + GOOD, 2, "is no JSON"),
        (GOOD + b"[1]\n", 2, "holds a list, not an object"),
        (GOOD + b'{"text": "a", "labl": 1}\n', 2, "there is no column 'label'"),
        (GOOD + b'{"text": 3, "label": 1}\n', 2, "'text' is the number 3, not text"),
        (GOOD + b'{"text": null, "label": 1}\n', 2, "'text' is null"),
        (GOOD + b'{"text": "a", "label": 0.5}\n', 2, "'label' is 0.5, neither a word nor a number|is 0.5"),
        (GOOD + b'{"text": "a", "label": null}\n', 2, "'label' is empty"),
        (GOOD + b'{"text": "\xff", "label": 1}\n', 2, "not UTF-8"),
        (GOOD + b'{"text": "a\\ud83d", "label": 1}\n', 2, "has half a character"),
    ],
)
def test_what_is_wrong_in_jsonl_is_named_with_its_line(
    folder: Path, tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    (tmp_path / "it.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load(folder, tmp_path / "it.jsonl")
    assert caught.value.where == f"{tmp_path / 'it.jsonl'}:{line}"
    assert caught.value.remedy


def test_what_is_harmless_is_read(folder: Path, tmp_path: Path) -> None:
    """A byte-order mark, an empty line at the very end, further columns, and a text beyond Python's own limit."""
    long = "film " * 30_000
    (tmp_path / "it.csv").write_text(f"\ufeffid,text,label\r\n1,a,x\r\n2,{long},y\r\n\r\n", encoding="utf-8")
    dataset = load(folder, tmp_path / "it.csv", max_tokens=40_000)
    assert [len(dataset[n][0]["input_ids"]) for n in range(2)] == [3, 30_002]
    (tmp_path / "it.tsv").write_text("text\tlabel\na, b\tx\nc\ty\n")
    assert len(load(folder, tmp_path / "it.tsv")) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"text": []}, "names no column"),
        ({"text": ["a", "b", "c"]}, "nor a pair"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"padding": "left"}, "padding is 'left'"),
        ({"labels": ["a", "a"]}, "a label twice"),
        ({"labels": ["mid"]}, "the only label is 'mid'"),
        ({"tokenizer": "nowhere"}, "there is no 'nowhere'"),
        ({"tokenizer": None}, "no tokenizer is named"),
    ],
)
def test_arguments_that_cannot_be_meant(folder: Path, tmp_path: Path, args: dict[str, Any], words: str) -> None:
    made.reviews(tmp_path / "it.csv", 3)
    with pytest.raises(DataError, match=words) as caught:
        load(folder, tmp_path / "it.csv", **args)
    assert caught.value.where.startswith("data.args")


def test_files_of_other_kinds_and_without_rows(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load(folder, tmp_path)
    with pytest.raises(DataError, match=r"there is no 'nowhere\.csv'"):
        load(folder, Path("nowhere.csv"))
    (tmp_path / "it.json").write_text("[]")
    with pytest.raises(DataError, match=r"neither \.csv, \.tsv nor \.jsonl"):
        load(folder, tmp_path / "it.json")
    for name, content in (("it.csv", "text,label\n"), ("it.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="has no rows"):
            load(folder, tmp_path / name)


def test_a_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = made.bert(tmp_path / "bare", tokenizer=False)
    path = made.reviews(tmp_path / "it.csv", 3)
    with pytest.raises(DataError, match=r"no tokenizer that can be used: there is no tokenizer\.json") as caught:
        load(bare, path)
    assert "copy tokenizer.json" in caught.value.remedy
    (bare / "vocab.txt").write_text("a")
    with pytest.raises(DataError, match=r"it has vocab\.txt") as caught:
        load(bare, path)
    assert "save_pretrained" in caught.value.remedy
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load(bare, path)
