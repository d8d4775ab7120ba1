"""Conversations: which tokens are learnt, how rows are shared, and every way in which a file is wrong."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import data, models
from bigtrain.data import TrainLoader
from bigtrain.data.conversations import packed
from bigtrain.errors import CombinationError, DataError
from bigtrain.protocols import Batch
from bigtrain.tasks.causal_lm import CausalLM
from tests.helpers import hugging_face as made

USER, ANSWER = {"role": "user", "content": "a fox"}, {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, a token for each byte."""
    return made.llama(tmp_path_factory.mktemp("tokenizer") / "llama")


def load(folder: Path, path: Path, **args: Any) -> Any:
    given = {"path": str(path), "tokenizer": str(folder), "context": 95, **args}
    return data.create("conversations", "train", given)


def rows(path: Path, *conversations: list[dict[str, Any]]) -> Path:
    return made.write_rows(path, [{"messages": messages} for messages in conversations])


def learnt(folder: Path, sample: dict[str, torch.Tensor]) -> str:
    """The text of what is learnt."""
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(folder)
    return str(library.decode([int(token) for token in sample["targets"] if token != -100]))


def test_answers_alone_are_learnt_and_where_they_end(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    system = {"role": "system", "content": "be brief"}
    path = rows(tmp_path / "it.jsonl", [system, USER, ANSWER, USER, {"role": "assistant", "content": "no"}])
    sample = load(folder, path)[0]
    text = AutoTokenizer.from_pretrained(folder).decode(sample["tokens"])
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    )
    assert learnt(folder, sample) == "yes<|im_end|>\nno<|im_end|>\n"
    assert learnt(folder, load(folder, path, learn="last")[0]) == "no<|im_end|>\n"
    counted = sample["targets"] != -100
    assert torch.equal(sample["targets"][counted], sample["tokens"][1:][counted])


def test_rows_are_shared(folder: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "it.jsonl", *([USER, ANSWER] for _ in range(5)))
    dataset = load(folder, path)
    alone = load(folder, path, pack=False)
    size = len(alone[0]["tokens"])
    assert (len(dataset), len(alone), size) == (2, 5, 29)
    assert dataset[1]["documents"].tolist() == [0] * size + [1] * size
    batch = dataset.collate([dataset[n] for n in range(2)])
    assert {name: tuple(part.shape) for name, part in batch.items()} == {
        "tokens": (2, 96),
        "targets": (2, 95),
        "documents": (2, 96),
    }
    assert batch["documents"][0].unique_consecutive().tolist() == [0, 1, 2, 3]  # the last fills up
    assert batch["documents"][1].unique_consecutive().tolist() == [0, 1, 2]
    assert not (batch["targets"][1, 2 * size :] != -100).any()
    assert alone.collate([alone[0], alone[1]]).keys() == {"tokens", "targets"}
    assert dataset.fingerprint() != alone.fingerprint()


def test_a_shared_rows_loss_is_that_of_each_alone(folder: Path, tmp_path: Path) -> None:
    """Loss, count and gradients, through the task, as training computes them."""
    made.chats(tmp_path / "it.jsonl")
    model = models.build(f"hf/{folder}", {"pretrained": False}).double()
    task, found = CausalLM(), []
    for pack in (True, False):
        dataset = load(folder, tmp_path / "it.jsonl", pack=pack)
        parts = [dataset.collate([dataset[n]]) for n in range(len(dataset))]
        sums = [task.loss(model, Batch(part, torch.ones(1), 1)) for part in parts]
        total = torch.stack([each.total for each in sums]).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        found.append((len(parts), total.detach(), sum(float(each.count) for each in sums), gradients))
    (shared, loss, count, slopes), (alone, expected, counted, theirs) = found
    assert shared < alone == 12
    assert count == counted > 12
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(slopes, theirs, strict=True))


def test_few_rows_are_needed() -> None:
    assert packed([5, 3, 5, 4, 6, 1], 8) == [[0], [1, 2], [3], [4, 5]]
    chosen = random.Random(0)
    lengths = [chosen.randint(1, 100) for _ in range(2000)]
    found = packed(lengths, 100)
    assert sorted(number for row in found for number in row) == list(range(2000))
    assert all(sum(lengths[number] for number in row) <= 100 for row in found)
    assert len(found) < 1.02 * sum(lengths) / 100
    assert packed(lengths, 100) == found


def test_a_model_that_cannot_keep_documents_apart(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, made.chats(tmp_path / "it.jsonl"))
    model = models.build("lstm", {"vocab": 260, "layers": 1, "width": 8, "context": 95})
    batch = next(TrainLoader(dataset, batch_size=2).steps()).microbatches[0]
    with pytest.raises(CombinationError, match="keep documents apart") as caught:
        CausalLM().check(model, batch)
    assert "pack=false" in caught.value.remedy


def test_what_does_not_fit(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [USER, {"role": "assistant", "content": "yes " * 9}]
    path = rows(tmp_path / "it.jsonl", [USER, ANSWER], long)
    with pytest.raises(DataError, match="has 62 tokens, and 51 fit") as caught:
        load(folder, path, context=50)
    assert caught.value.where == f"{path}:2"
    with caplog.at_level(logging.WARNING):
        assert load(folder, path, context=50, too_long="skip").num_conversations == 1
    assert "1 conversations are longer than data.args.context, 50: they were left out" in caplog.text
    cut = load(folder, path, context=50, too_long="cut", pack=False)
    assert learnt(folder, cut[1]) == ("yes " * 9)[: 51 - 24]
    with pytest.raises(DataError, match="no conversations that fit"):
        load(folder, path, context=20, too_long="cut")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "holds no messages"),
        ("hello", "holds no messages"),
        ([USER, {"content": "x"}], "message 2 has no role"),
        ([USER, "x"], "message 2 has no role"),
        ([USER, {"role": "assistant", "content": None}], "message 2, of 'assistant', has no text"),
        ([USER, {"role": "assistant", "content": " "}], "message 2, of 'assistant', has no text"),
        ([USER], "no answer to learn: the roles are user"),
        ([{"from": "human", "value": "x"}], "message 1 has no role"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder: Path, tmp_path: Path, messages: Any, words: str) -> None:
    path = rows(tmp_path / "it.jsonl", [USER, ANSWER], messages)
    with pytest.raises(DataError, match=words) as caught:
        load(folder, path)
    assert caught.value.where == f"{path}:2"
    assert '{"messages": [{"role": "user"' in caught.value.remedy


def test_a_greeting_answers_nothing(folder: Path, tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "hello"}
    dataset = load(folder, rows(tmp_path / "it.jsonl", [greeting, USER, ANSWER]))
    assert learnt(folder, dataset[0]) == learnt(folder, load(folder, rows(tmp_path / "b.jsonl", [USER, ANSWER]))[0])
    with pytest.raises(DataError, match="its only answer comes first") as caught:
        load(folder, rows(tmp_path / "it.jsonl", [USER, ANSWER], [greeting, USER]))
    assert caught.value.where.endswith("it.jsonl:2")


def with_template(folder: Path, template: str | None) -> Path:
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(folder)
    library.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    library.save_pretrained(folder)
    return folder


def test_templates_that_do_not_serve(tmp_path: Path) -> None:
    folder = made.llama(tmp_path / "llama")
    path = rows(tmp_path / "it.jsonl", [USER, ANSWER, USER, ANSWER])
    with pytest.raises(DataError, match="has no chat template"):
        load(with_template(folder, None), path)
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses the conversation: roles must alternate") as caught:
        load(with_template(folder, refuses), path)
    assert caught.value.where == f"{path}:1"
    # As templates do that take the thoughts out of earlier answers.
    forgets = made.CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '…' }}"
    )
    with pytest.raises(DataError, match="writes message 2 otherwise in a longer conversation") as caught:
        load(with_template(folder, forgets), path)
    assert "learn=last" in caught.value.remedy
    assert learnt(folder, load(folder, path, learn="last")[0]) == "yes<|im_end|>\n"


@pytest.mark.parametrize(
    "args", [{"context": 1}, {"context": "long"}, {"learn": "some"}, {"pack": "yes"}, {"too_long": "split"}]
)
def test_arguments_that_cannot_be_meant(folder: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    (name,) = args
    with pytest.raises(DataError) as caught:
        load(folder, made.chats(tmp_path / "it.jsonl"), **args)
    assert caught.value.where == f"data.args.{name}"
