"""What was written by any layout over any number of ranks is read by any other, bit for bit."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import open_checkpoint
from bigtrain.checkpoint import reading as reading_module
from bigtrain.checkpoint.files import Files
from bigtrain.checkpoint.shards import CHUNK
from bigtrain.errors import CheckpointError, SaveError
from bigtrain.state import Box, EngineState, Piece, whole
from tests.helpers.checkpoints import (
    EXTRA,
    HYPER,
    LAYOUTS,
    assert_fills,
    assert_holds,
    cut,
    same_bits,
    save_all,
    saved,
    some_tensors,
)
from tests.helpers.faulty import FULL

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 11, 13]), max_size=3).map(tuple)


@st.composite
def states(draw):
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    tensors = {}
    for number, shape in enumerate(shapes):
        dtype = draw(st.sampled_from(DTYPES))
        raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        raw = raw % 2 if dtype == torch.bool else raw  # any bits, NaNs among them
        tensors["weight", f"layers.{number}"] = raw.view(dtype).view(shape)
    return tensors


@settings(deadline=None, max_examples=1000 if FULL else 120)
@given(states(), st.sampled_from(LAYOUTS), st.integers(1, 5), st.sampled_from(LAYOUTS), st.integers(1, 5))
def test_any_layout_reads_what_any_other_wrote(tensors, source, writers, target, readers):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder), 1, cut(source, tensors, writers))
        assert_holds(path, tensors)
        with open_checkpoint(path) as reader:
            assert reader.num_writers == writers
            assert_fills(reader, cut(target, tensors, readers))


@pytest.mark.parametrize("layout", ["replicated", "rows", "flat", "group", "pairs"])
def test_every_engines_layout_is_a_rule(tmp_path, layout):
    tensors = {
        ("weight", name): torch.arange(math.prod(shape)).view(shape)
        for name, shape in {"a": (17, 3), "b": (5, 2), "c": (1,), "d": (2, 3, 4), "e": ()}.items()
    }
    with open_checkpoint(saved(tmp_path, 1, cut(layout, tensors, 4))) as reader:
        assert all(found.cut and not found.writers for found in reader.manifest.tensors.values())


def test_another_layout_is_a_list(tmp_path):
    tensors = {("weight", "a"): torch.arange(12).view(3, 4)}
    with open_checkpoint(saved(tmp_path, 1, cut("columns", tensors, 3))) as reader:
        assert reader.manifest.tensors["weight", "a"].writers == (0, 1)  # two columns each


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of several chunks, by several writers."""
    tensors = {
        ("weight", "w"): torch.randn(3000, 700),
        ("exp_avg", "w"): torch.randn(3000, 700).bfloat16(),
        ("weight", "small"): torch.randn(3),
    }
    return tensors, saved(tmp_path_factory.mktemp("large"), 7, cut("flat", tensors, 3))


@pytest.mark.parametrize(("layout", "size"), [("rows", 2), ("group", 5), ("columns", 2), ("replicated", 1)])
def test_tensors_of_many_chunks(large, layout, size):
    tensors, path = large
    with open_checkpoint(path) as reader:
        assert_fills(reader, cut(layout, tensors, size))


def test_reads_into_any_memory(large, monkeypatch):
    tensors, path = large
    monkeypatch.setattr(reading_module, "_SCRATCH", 5000)
    full = tensors["weight", "w"]
    box = Box((999, 13), (1002, 601))
    with open_checkpoint(path) as reader:
        spread = torch.zeros(1002, 1202)[:, ::2]
        reader.read_into("weight", "w", box, spread)
        assert same_bits(spread, full[box.slices])
        other = torch.zeros(601, 1002, dtype=torch.float64).T
        reader.read_into("weight", "w", box, other)
        assert torch.equal(other, full[box.slices].double())
        parameter = torch.nn.Parameter(torch.zeros(3))
        reader.read_into("weight", "small", whole((3,)), parameter)
        assert same_bits(parameter.detach(), tensors["weight", "small"])


def test_one_element_of_any_stride(tmp_path):
    """To torch it lies in one piece, and is no view of its bytes."""
    tensors = {("weight", "a"): torch.randn(3, 11)[:, 4][:1], ("weight", "b"): torch.randn(1, 11).t()[:1]}
    expected = {key: tensor.clone() for key, tensor in tensors.items()}
    assert [tensor.stride() for tensor in tensors.values()] == [(11,), (1, 11)]
    path = saved(tmp_path, 1, cut("replicated", tensors, 1))
    with open_checkpoint(path) as reader:
        for (kind, name), tensor in tensors.items():
            tensor.zero_()
            reader.read_into(kind, name, whole(tensor.shape), tensor)
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)


def test_only_what_is_needed_is_read(large):
    """A row costs the chunks it lies in, and no other file is opened."""
    tensors, path = large
    operations = []
    with open_checkpoint(path, Files(lambda operation, where: operations.append((operation, where.name)))) as reader:
        operations.clear()
        out = torch.empty(1, 700)
        reader.read_into("weight", "w", Box((1500, 0), (1, 700)), out)
        assert same_bits(out[0], tensors["weight", "w"][1500])
    assert {name for _, name in operations} == {"shard-00001.safetensors"}
    assert [operation for operation, _ in operations].count("read") == 2  # header, one chunk


def test_the_safetensors_library_opens_every_shard(tmp_path):
    tensors = some_tensors() | {("buffer", f"b{i}"): torch.zeros(3, dtype=dtype) for i, dtype in enumerate(DTYPES)}
    tensors["weight", "none"] = torch.zeros(0, 4)
    path = saved(tmp_path, 3, cut("rows", tensors, 3))
    seen = {}
    for shard in sorted(path.glob("*.safetensors")):
        seen |= safetensors.torch.load_file(shard)
    assert sum(t.numel() for t in seen.values()) == sum(t.numel() for t in tensors.values())
    assert torch.equal(seen["weight:up[3:6/7,0:5/5]"], tensors["weight", "up"][3:6])
    assert seen["step:up[]"].shape == ()


def test_everything_else_comes_back_exactly(tmp_path):
    path = saved(tmp_path, 123456789012, cut("rows", some_tensors(), 2))
    assert path.name == "step-123456789012"
    with open_checkpoint(path) as reader:
        assert (reader.step, reader.hyper, reader.extra) == (123456789012, HYPER, EXTRA)
        assert isinstance(reader.hyper["w"]["betas"], tuple)
        assert [reader.own(rank) for rank in (0, 1)] == [{"rng": b"\0"}, {"rng": b"\1"}]


def test_the_manifest_grows_with_tensors_and_files(tmp_path):
    few, many = some_tensors(), {(k, f"{n}.{i}"): t for (k, n), t in some_tensors().items() for i in range(20)}
    size = {
        (name, writers): (saved(tmp_path / f"{name}{writers}", 1, cut("flat", tensors, writers)) / "manifest.json")
        .stat()
        .st_size
        for name, tensors in (("few", few), ("many", many))
        for writers in (2, 12)
    }
    per_file = (size["few", 12] - size["few", 2]) / 10
    assert per_file < 60
    assert (size["many", 12] - size["many", 2]) / 10 == pytest.approx(per_file, rel=0.3)


def test_the_manifest_is_plain_json(tmp_path):
    content = json.loads((saved(tmp_path, 4, cut("rows", some_tensors(), 2)) / "manifest.json").read_text())["manifest"]
    assert content["step"] == 4
    assert content["tensors"]["weight"]["up"] == {"dtype": "F32", "shape": [7, 5], "cut": [0, 20, 20]}
    assert len(content["shards"]) == 2


def test_chunks_are_what_the_header_says(large):
    _, path = large
    raw = (path / "shard-00000.safetensors").read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    begin, end = header["weight:w[0:1000/3000,0:700/700]"]["data_offsets"]
    data = raw[length + begin : length + end]
    hashes = "".join(xxhash.xxh3_128_hexdigest(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK))
    assert header["__metadata__"]["xxh3_128"].startswith(hashes)


def test_boxes_lie_as_aligned_as_they_can(tmp_path):
    """Pages are copied faster as wholes, and an element must not lie across its own size."""
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]
    sizes = [1, 3, 8, 64, 1000, 1024, 4096, 4099, 12288, 0]
    tensors = {("weight", f"{d}.{n}"): torch.ones(n, dtype=d) for n in sizes for d in dtypes}
    path = saved(tmp_path, 1, cut("replicated", tensors, 1))
    assert_holds(path, tensors)
    raw = (path / "shard-00000.safetensors").read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    assert length % 4096 == 0
    header = json.loads(raw[8:length])
    del header["__metadata__"]
    for title, entry in header.items():
        begin, end = entry["data_offsets"]
        assert end == begin or begin % min(4096, (end - begin) & (begin - end)) == 0, title


def piece(shape, box, owner=True, name="w", dtype=torch.float32):
    return Piece(name, "weight", shape, dtype, box, torch.zeros(box.size, dtype=dtype), owner)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (
            [[piece((4, 2), Box((0, 0), (2, 2)))], [piece((4, 2), Box((3, 0), (1, 2)))]],
            "own 6 elements of weight w, which has 8",
        ),
        ([[piece((4,), whole((4,)))], [piece((4,), whole((4,)))]], "own 8 elements of weight w, which has 4"),
        ([[piece((4,), whole((4,)))], [piece((5,), Box((4,), (1,)))]], "disagree"),
        ([[piece((4,), Box((0,), (2,)))], [piece((4,), Box((2,), (2,)), dtype=torch.float16)]], "disagree"),
        ([[piece((4,), Box((1,), (2,)))], [piece((4,), Box((2,), (2,)))]], "or some of them twice"),
        ([[piece((4,), whole((4,))), piece((4,), whole((4,)))], []], "given twice"),
        ([[piece((4,), whole((4,)), dtype=torch.complex64)], []], "complex64"),
    ],
)
def test_a_state_that_is_not_whole_is_refused(tmp_path, pieces, words):
    results = save_all(tmp_path, 1, [EngineState(held, {}) for held in pieces])
    assert all(isinstance(error, SaveError) and words in str(error) for error in results), results
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_value_is_refused(tmp_path):
    states = cut("rows", some_tensors(), 2)
    odd = [EngineState(state.pieces, {"w": {"lr": torch.tensor(1.0)}}) for state in states]
    for error in save_all(tmp_path, 1, odd):
        assert "state.hyper.w.lr is of type Tensor" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("box", [Box((0,), (14,)), Box((-1,), (2,)), Box((0, 0), (1, 1))])
def test_a_box_outside_of_the_tensor_is_refused(tmp_path, box):
    with open_checkpoint(saved(tmp_path, 1, cut("rows", some_tensors(), 1))) as reader:
        with pytest.raises(CheckpointError, match="has no weight bias"):
            reader.read_into("weight", "bias", box, torch.zeros(box.size))
        with pytest.raises(CheckpointError, match="has no weight other"):
            reader.read_into("weight", "other", whole(()), torch.zeros(()))
