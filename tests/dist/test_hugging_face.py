"""Hugging Face folders under fsdp and ZeRO-3 on two ranks: the losses of one process, and logits equal after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.checkpoint import open_checkpoint
from bigtrain.doors.exporting import export
from bigtrain.evaluating import find_checkpoint, opened
from bigtrain.tracking.reading import read_rows
from tests.dist.test_resuming import engine_of
from tests.helpers import hugging_face as made
from tests.helpers.distributed import run_distributed

CASES = [("bert", "fsdp"), ("llama", "fsdp"), ("llama", "zero3")]


def settings(folder: Path, model: str, layout: str) -> dict[str, Any]:
    own = {"name": f"{model}-{layout}", "dir": str(folder / "runs"), "seed": 1}
    return made.run_file(folder, folder / model, run=own, engine=engine_of(layout))


def train_all(folder: str) -> None:
    for model, layout in CASES:
        bigtrain.train(settings(Path(folder), model, layout))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if "loss" in row and "event" not in row]


@pytest.mark.slow
def test_fine_tuned_on_two_ranks_and_opened_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    made.bert(tmp_path / "bert")
    made.llama(tmp_path / "llama")
    made.reviews(tmp_path / "reviews.csv")
    made.chats(tmp_path / "chats.jsonl")
    run_distributed(train_all, 2, str(tmp_path))
    alone = {name: bigtrain.train(settings(tmp_path, name, "single")).path for name in ("bert", "llama")}
    tokens = torch.randint(4, 17, (2, 9))
    for model, layout in CASES:
        run = tmp_path / "runs" / f"{model}-{layout}"
        assert len(losses(run)) == 4
        assert losses(run) == pytest.approx(losses(alone[model]), rel=1e-5)
        with open_checkpoint(find_checkpoint(run)) as reader:
            export(reader, tmp_path / f"out-{model}-{layout}", "hf")
        library = AutoModelForSequenceClassification if model == "bert" else AutoModelForCausalLM
        theirs = library.from_pretrained(tmp_path / f"out-{model}-{layout}").eval()
        with opened(find_checkpoint(run)) as trained, trained.evaluating():
            ours = trained.model({"input_ids": tokens} if model == "bert" else tokens)
            assert torch.equal(theirs(input_ids=tokens).logits, ours)
