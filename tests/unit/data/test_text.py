"""Text and token files: what a window holds, and what a folder of tokens holds."""

import json
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from bigtrain.cli.data import app
from bigtrain.data import TrainLoader, build, create
from bigtrain.data.token_files import pack
from bigtrain.data.windows import Windows
from bigtrain.errors import DataError

SEPARATOR = 256


@pytest.fixture
def texts(tmp_path):
    """Three documents, an empty one and a hidden one."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"hello")
    (folder / "b" / "c.txt").write_bytes(b"\x00\xff")
    (folder / "b" / "empty.txt").write_bytes(b"")
    (folder / "d.md").write_bytes(b"world!")
    (folder / ".hidden").write_bytes(b"secret")
    return folder


ALL_TOKENS = [*b"hello", SEPARATOR, *b"\x00\xff", SEPARATOR, *b"world!", SEPARATOR]


@pytest.fixture
def tokenizer_file(tmp_path):
    """A real tokenizer of words: 0 is unknown, 1 ends a document."""
    vocabulary = {"?": 0, "<|endoftext|>": 1, "one": 2, "two": 3, "three": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return str(path)


def tokens_of(dataset):
    """All windows put together again."""
    rows = dataset.__getitems__(range(len(dataset)))["tokens"]
    return [*rows[:, :-1].reshape(-1).tolist(), rows[-1, -1].item()]


# ----------------------------------------------------------------------------------------------------------- windows


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), context=st.integers(1, 7), data=st.data())
def test_a_window_holds_its_tokens_and_numbers_its_documents(lengths, context, data):
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
    if len(tokens) <= context:
        with pytest.raises(DataError, match="needs"):
            Windows(tokens, context=context, vocab_size=200, documents=begins, fingerprint=str)
        return
    windows = Windows(tokens, context=context, vocab_size=200, documents=begins, fingerprint=str)
    assert len(windows) == (len(tokens) - 1) // context
    indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=6))
    batch = windows.__getitems__(indices)
    for row, index in enumerate(indices):
        part = slice(index * context, index * context + context + 1)
        assert batch["tokens"][row].tolist() == tokens[part].tolist()
        assert batch["documents"][row].tolist() == (document_of[part] - document_of[part][0]).tolist()
        one = windows[index]
        assert torch.equal(one["tokens"], batch["tokens"][row])
        assert torch.equal(one["documents"], batch["documents"][row])
    assert batch["tokens"].dtype == batch["documents"].dtype == torch.int64


@pytest.mark.parametrize("context", [0, -3, 1.5, "8"])
def test_a_context_of_no_length_is_refused(texts, context):
    with pytest.raises(DataError, match="not a positive number of tokens"):
        create("text", "train", {"source": str(texts), "context": context})


# -------------------------------------------------------------------------------------------------------------- text


def test_a_folder_is_its_files_in_order_of_their_paths(texts):
    dataset = create("text", "train", {"source": str(texts), "context": 3, "attend_across_documents": False})
    assert tokens_of(dataset) == ALL_TOKENS
    assert dataset.vocab_size == 257
    batch = dataset.__getitems__([0, 1, 4])
    assert batch["documents"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert "documents" not in create("text", "train", {"source": str(texts), "context": 3})[0]


def test_patterns_and_single_files(texts):
    pattern = create("text", "train", {"source": str(texts / "**" / "*.txt"), "context": 1})
    assert tokens_of(pattern) == [*b"hello", SEPARATOR, *b"\x00\xff", SEPARATOR]
    single = create("text", "train", {"source": str(texts / "d.md"), "context": 2})
    assert tokens_of(single) == [*b"world!", SEPARATOR]


def test_a_tokenizer_file(tmp_path, tokenizer_file):
    (tmp_path / "1.txt").write_text("one two\nthree four")
    (tmp_path / "2.txt").write_text("two")
    args = {"source": str(tmp_path / "*.txt"), "context": 1, "tokenizer": tokenizer_file}
    dataset = create("text", "train", args)
    assert tokens_of(dataset) == [2, 3, 4, 0, 1, 3, 1]
    assert dataset.vocab_size == 5


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer_file):
    (tmp_path / "1.txt").write_text("one two", encoding="utf-8-sig")
    args = {"source": str(tmp_path / "1.txt"), "context": 1, "tokenizer": tokenizer_file}
    assert tokens_of(create("text", "train", args)) == [2, 3, 1]


def test_a_long_document_is_one_document(tmp_path, tokenizer_file):
    (tmp_path / "long.txt").write_text("one two three\n" * 200_000)  # 2.8 MB: several pieces
    args = {"source": str(tmp_path / "long.txt"), "context": 3, "attend_across_documents": False}
    for tokenizer, count in [("bytes", 2_800_001), (tokenizer_file, 600_001)]:
        dataset = create("text", "train", {**args, "tokenizer": tokenizer})
        assert len(dataset) == (count - 1) // 3
        assert dataset.__getitems__(range(len(dataset)))["documents"].max() == 0
    assert tokens_of(dataset)[:200] == ([2, 3, 4] * 67)[:200]


def test_a_line_longer_than_a_piece_is_cut(tmp_path, tokenizer_file):
    (tmp_path / "line.txt").write_text("one " * 700_000)  # a piece is 2^20 characters, a multiple of these four
    dataset = create("text", "train", {"source": str(tmp_path / "line.txt"), "context": 1, "tokenizer": tokenizer_file})
    assert tokens_of(dataset) == [2] * 700_000 + [1]


def test_the_standard_library_is_real_text():
    dataset = create("text", "train", {"source": "python-stdlib", "context": 1024})
    assert len(dataset) > 2000
    first = (Path(sysconfig.get_path("stdlib")) / "__future__.py").read_bytes()
    assert dataset[0]["tokens"].tolist() == list(first[:1025])


def test_text_can_be_held_out_and_trained_on(texts):
    sets = build("text", {"source": str(texts), "context": 3}, evaluation=0.4)
    (batch,) = next(TrainLoader(sets.train, batch_size=3).steps()).microbatches
    assert batch.data["tokens"].shape == (3, 4)
    assert len(sets.train) + len(sets.eval) == 5


@pytest.mark.parametrize(
    ("change", "problem", "where"),
    [
        ({"source": "{folder}/none.txt"}, "there is no", "data.args.source"),
        ({"source": "{folder}/*.doc"}, "matches no files", "data.args.source"),
        ({"source": "{folder}/b/empty.txt"}, "is empty", "data.args.source"),
        ({"tokenizer": "{folder}/none.json"}, "there is no", "data.args.tokenizer"),
        ({"tokenizer": "{folder}/a.txt"}, "is no tokenizer", "data.args.tokenizer"),
        ({"context": 16}, "needs 17", "data.args"),
        ({"contxt": 4}, "no argument 'contxt'", "data.args"),
    ],
)
def test_wrong_text(texts, change, problem, where):
    filled = {k: v.format(folder=texts) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(DataError, match=problem) as caught:
        create("text", "train", {"source": str(texts), "context": 3, **filled})
    assert caught.value.where.startswith(where)
    assert caught.value.remedy


def test_what_is_not_utf8_needs_bytes(texts, tokenizer_file):
    with pytest.raises(DataError, match=r"c.txt' is not UTF-8"):
        create("text", "train", {"source": str(texts), "context": 1, "tokenizer": tokenizer_file})


# ------------------------------------------------------------------------------------------------------- token files


def test_packed_text_is_the_same_text(texts, tmp_path):
    meta = pack(str(texts), tmp_path / "packed")
    assert (meta.num_tokens, meta.num_documents, meta.dtype) == (len(ALL_TOKENS), 3, "uint16")
    on_disk = np.fromfile(tmp_path / "packed" / "tokens.bin", dtype="<u2").tolist()
    assert on_disk == ALL_TOKENS
    assert np.fromfile(tmp_path / "packed" / "documents.bin", dtype="<u8").tolist() == [0, 6, 9]
    args = {"context": 4, "attend_across_documents": False}
    packed = create("tokens", "train", {"path": str(tmp_path / "packed"), **args})
    plain = create("text", "train", {"source": str(texts), **args})
    assert packed.vocab_size == plain.vocab_size
    for key, values in packed.__getitems__(range(len(packed))).items():
        assert torch.equal(values, plain.__getitems__(range(len(plain)))[key])


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "large.json"))
    (tmp_path / "text.txt").write_text("w65536 w3 w69999")
    meta = pack(str(tmp_path / "text.txt"), tmp_path / "packed", str(tmp_path / "large.json"))
    assert (meta.dtype, meta.vocab_size, meta.separator) == ("uint32", 70_001, 70_000)
    assert tokens_of(create("tokens", "train", {"path": str(tmp_path / "packed"), "context": 1})) == [
        *(65536, 3, 69999, 70_000)
    ]


def test_packing_needs_little_memory(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"0123456789abcdef" * (3 << 20))  # 48 MiB
    tracemalloc.start()
    try:
        meta = pack(str(tmp_path / "long.txt"), tmp_path / "packed")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta.num_tokens == (48 << 20) + 1
    assert peak < 12 << 20


def test_nothing_is_left_of_a_packing_that_failed(texts, tmp_path, tokenizer_file):
    with pytest.raises(DataError, match="not UTF-8"):
        pack(str(texts), tmp_path / "out" / "packed", tokenizer_file)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(texts, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="exists already"):
        pack(str(texts), tmp_path / "there")


def test_empty_text_is_not_packed(texts, tmp_path):
    with pytest.raises(DataError, match="is empty"):
        pack(str(texts / "b" / "empty.txt"), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def open_packed(folder):
    return create("tokens", "train", {"path": str(folder), "context": 2})


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("change", [b"cut", b"longer", b"gone"])
def test_files_of_the_wrong_length_are_refused(texts, tmp_path, name, change):
    pack(str(texts), tmp_path / "packed")
    path = tmp_path / "packed" / name
    content = path.read_bytes()
    if change == b"gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if change == b"cut" else content + b"\0\0")
    with pytest.raises(DataError, match=f"{name}' has"):
        open_packed(tmp_path / "packed")


@pytest.mark.parametrize(
    "change",
    [{"format": "other-9"}, {"dtype": "float64"}, {"num_tokens": "16"}, {"num_tokens": None}, "not json", None],
    ids=str,
)
def test_a_damaged_description_is_refused(texts, tmp_path, change):
    pack(str(texts), tmp_path / "packed")
    path = tmp_path / "packed" / "meta.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        open_packed(tmp_path / "packed")
    assert caught.value.where == "data.args.path"
    assert "bigtrain data pack" in caught.value.remedy


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        open_packed(tmp_path / "none")


def test_fingerprints_follow_the_tokens_and_their_cutting(texts, tmp_path):
    def text(context=3):
        return build("text", {"source": str(texts), "context": context}).fingerprint

    def packed():
        return build("tokens", {"path": str(tmp_path / "packed"), "context": 3}).fingerprint

    pack(str(texts), tmp_path / "packed")
    before = text(), packed()
    assert (text(), packed()) == before
    assert text(context=4) != before[0]
    (texts / "a.txt").write_bytes(b"hellO")
    assert text() != before[0]
    content = bytearray((tmp_path / "packed" / "tokens.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "packed" / "tokens.bin").write_bytes(content)
    assert packed() != before[1]


def test_the_command_packs(texts, tmp_path):
    result = CliRunner().invoke(app, ["pack", str(texts), str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert "16 tokens (uint16) of 3 documents, vocabulary 257" in result.output
    assert len(open_packed(tmp_path / "packed")) == 7
