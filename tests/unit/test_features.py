"""Cached features: the same training as without, computed once, and never taken when they are not whole or others."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain.checkpoint import find, open_checkpoint
from bigtrain.errors import BigtrainError, CombinationError, RankError, SaveError
from bigtrain.evaluating import evaluate, find_checkpoint, opened
from tests.helpers import transfer
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import BrokenOffError, break_off, losses


class Counting(transfer.Net):
    """Counts what goes through its extractor."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Counting.seen += len(images)
        return super().forward(images)


class Dropping(transfer.Net):
    def __init__(self, *, num_classes: int = 5) -> None:
        super().__init__(num_classes=num_classes)
        self.stem = nn.Sequential(self.stem, nn.Dropout(0.3))


class Scaled(transfer.Net):
    """Does more after its head."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


class Twice(transfer.Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + super().forward(images)


def config(folder: Path, name: str, *, cached: bool = True, model: str = "Counting", **changes: Any) -> dict[str, Any]:
    made = transfer.config(folder, name, [0, 1, 2, 3, 4], **changes)
    made["model"]["name"] = f"{__name__}:{model}"
    made["train"] = {"epochs": 3, "micro_batch_size": 32}
    made["finetune"] = {"freeze": ["stem.*", "layers.*"], "freeze_batchnorm": True}
    if cached:
        made["finetune"]["feature_cache"] = str(folder / "features")
    return made


def train(values: dict[str, Any], **options: Any) -> tuple[bigtrain.Run, int]:
    """The run, and how many pictures went through the extractor."""
    before = Counting.seen
    run = bigtrain.train(values, **options)
    return run, Counting.seen - before


def cache_of(folder: Path) -> Path:
    (found,) = (folder / "features").iterdir()
    return found


def log_of(run: bigtrain.Run) -> str:
    return (
        run.path / "attempts" / max(os.listdir(run.path / "attempts"), key=int) / "logs/rank-00000.stdout"
    ).read_text()


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> bigtrain.Run:
    return bigtrain.train(config(tmp_path_factory.mktemp("without"), "without", cached=False))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    bigtrain.train({**config(folder, "run"), "train": {"steps": 1, "micro_batch_size": 32}})
    return folder / "features"


def assert_same(run: bigtrain.Run, expected: bigtrain.Run) -> None:
    for ours, theirs in zip(losses(run), losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert run.evaluation["loss"] == pytest.approx(expected.evaluation["loss"], rel=1e-5)
    assert run.evaluation["accuracy"] == expected.evaluation["accuracy"]


def test_the_same_training_and_the_extractor_runs_once(tmp_path, without):
    first, ran = train(config(tmp_path, "first"))
    assert_same(first, without)
    assert ran == 901 + 3 * 2  # every sample once; two samples in each of three forward passes that look
    second, ran = train(config(tmp_path, "second"))
    assert_same(second, without)
    assert losses(second) == losses(first)
    assert ran == 4 * 2
    assert "features of 901 samples before head" in log_of(first)
    assert f"are read from {cache_of(tmp_path)}" in log_of(second)


def test_the_model_is_whole_again_afterwards(tmp_path, without):
    run, _ = train(config(tmp_path, "run"))
    images = torch.rand(2, 1, 8, 8)
    assert run.model(images).shape == (2, 5)
    with open_checkpoint(find(run.path / "checkpoints")[0]) as reader:
        assert ("weight", "stem.weight") in reader.index
    with opened(find_checkpoint(run.path)) as trained:
        assert evaluate(trained).metrics["loss"] == pytest.approx(run.evaluation["loss"], rel=1e-5)


def test_a_run_that_is_broken_off_goes_on(tmp_path, without):
    values = config(tmp_path, "run")
    with pytest.raises(BrokenOffError):
        bigtrain.train(values, hooks=[break_off(9)])
    run, ran = train(values)
    assert ran == 4 * 2
    assert_same(run, without)


def test_other_weights_or_data_have_features_of_their_own(tmp_path):
    train(config(tmp_path, "run"))
    for number, changes in enumerate((
        {"run": {"seed": 2}}, {"data": {"args": {"classes": [4, 3, 2, 1, 0]}}}, {"data": {"eval": {"split": 0.3}}},
        {"data": {"transforms": {"train": [{"name": "Pad", "args": {"padding": 1}}]}}}, {"precision": "bf16"},
    ), 2):  # fmt: skip
        values = config(tmp_path, f"run{number}")
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        values["train"] = {"steps": 1}
        train(values)
        assert len(list((tmp_path / "features").iterdir())) == number
    values = config(tmp_path, "again", optim={"lr": 0.1})
    values["data"]["batch_size"] = 64  # the same features
    values["train"] = {"steps": 1}
    assert train(values)[1] == 4 * 2


# ---- what is not whole ----------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def of_another_key(path: Path) -> None:
    """A manifest that is whole, and of other weights."""
    import xxhash

    content = json.loads(path.read_text())["content"] | {"key": "0" * 32}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"xxh3_128": xxhash.xxh3_128_hexdigest(text.encode()), "content": content}))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("name", "damage"), [
    ("train-0-00000.bin", cut_short), ("train-0-00000.bin", flip), ("eval-1-00000.bin", flip),
    ("train-1-00000.bin", Path.unlink), ("eval-0-00000.bin", empty), ("train-0-00000.bin", link),
    ("manifest.json", Path.unlink), ("manifest.json", cut_short), ("manifest.json", flip), ("manifest.json", empty),
    ("manifest.json", of_another_key),
])  # fmt: skip
def test_what_is_not_whole_is_computed_anew(tmp_path, without, kept, name, damage):
    shutil.copytree(kept, tmp_path / "features")
    damage(cache_of(tmp_path) / name)
    run, ran = train({**config(tmp_path, "run"), "train": {"steps": 2, "micro_batch_size": 32}})
    assert ran >= 901
    assert "cannot be used" in log_of(run)
    for ours, theirs in zip(losses(run), losses(without), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-5)
    cache = cache_of(tmp_path)
    assert {path.name: path.read_bytes() for path in cache.glob("*.bin")} == {
        path.name: path.read_bytes() for path in cache_of(kept.parent).glob("*.bin")
    }


def killed_before_the_commit(folder: str) -> None:
    from bigtrain.features import using

    using.commit = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    bigtrain.train(config(Path(folder), "first"))


@pytest.mark.slow
def test_what_a_writer_that_was_killed_left_is_no_cache(tmp_path):
    with pytest.raises(RankError, match="died with exit code -9"):
        run_distributed(killed_before_the_commit, 1, str(tmp_path))
    assert [path.name[32:37] for path in (tmp_path / "features").iterdir()] == [".tmp-"]
    assert train(config(tmp_path, "second"))[1] >= 901
    (left,) = (tmp_path / "features").glob("*.tmp-*")  # it might still be written
    os.utime(left, (0, 0))
    shutil.rmtree(next(path for path in (tmp_path / "features").iterdir() if path != left))
    train(config(tmp_path, "third"))
    assert not left.exists()


def test_another_run_that_was_faster_is_taken_at_its_word_when_it_is_whole(tmp_path, without, kept, monkeypatch):
    from bigtrain.features import using

    commit = using.commit

    def late(folder: Path, key: str, *arguments: Any) -> None:
        commit(folder, key, *arguments)
        shutil.copytree(kept / key, tmp_path / "features" / key)

    monkeypatch.setattr(using, "commit", late)
    run, _ = train(config(tmp_path, "run"))
    assert_same(run, without)
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_features_of_another_code_are_computed_anew(tmp_path, kept, monkeypatch):
    """Weights and data are the same, and what the model does with them is not."""
    shutil.copytree(kept, tmp_path / "features")
    forward = transfer.Block.forward
    monkeypatch.setattr(transfer.Block, "forward", lambda self, x: forward(self, x) + 1.0)
    run, ran = train({**config(tmp_path, "second"), "train": {"steps": 1}})
    assert ran >= 901
    assert "others than the model computes now" in log_of(run)


def test_a_disk_that_is_full_or_shut_is_said(tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(SaveError) as caught:
        train(config(tmp_path, "run"))
    assert caught.value.where == "finetune.feature_cache"
    assert f"cannot be kept in {tmp_path}/features" in caught.value.problem
    assert not (tmp_path / "runs").exists()


# ---- what cannot be ----------


@pytest.mark.parametrize(("model", "words"), [
    ("Dropping", "says something else in training"), ("Scaled", "does more after it"), ("Twice", "called 2 times"),
])  # fmt: skip
def test_a_model_whose_features_are_not_all_is_refused(tmp_path, model, words):
    with pytest.raises(CombinationError, match=words):
        train(config(tmp_path, "run", model=model))
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"data.transforms": {"train": ["RandomHorizontalFlip"]}}, "random choices"),
    ({"data.mix": {"mixup": 0.2}}, "mixes samples anew"),
    ({"finetune.freeze": ["stem.*"]}, "one part of the model"),
    ({"finetune.freeze": []}, "nothing is frozen"),
    ({"compile": "model"}, "there is nothing to compile"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(tmp_path, changes, words):
    values = config(tmp_path, "run")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section] = {**values[section], name: value} if name else value
    with pytest.raises(BigtrainError, match=words):
        train(values)
    assert not (tmp_path / "features").exists()
    assert not (tmp_path / "runs").exists()


def test_a_phase_in_which_more_trains_runs_the_extractor(tmp_path):
    runs = []
    for name, cached in (("without", False), ("with", True)):
        values = config(tmp_path, name, cached=cached)
        values["finetune"]["unfreeze"] = [{"at_epoch": 2, "match": "layers.2.*"}]
        runs.append(train(values))
    assert runs[1][1] == 901 + 3 * 2 + 2 + 721 + 180  # the third epoch is tried as the first was, and evaluated
    assert_same(runs[1][0], runs[0][0])
