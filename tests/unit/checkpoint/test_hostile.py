"""Files that somebody made to do harm: refused by a typed error, soon, and without memory; nothing in them runs."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import resource
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigtrain.checkpoint
from bigtrain.checkpoint import diff, load_newest, open_checkpoint, verify
from bigtrain.checkpoint.manifest import decode as decode_manifest
from bigtrain.checkpoint.shards import decode as decode_header
from bigtrain.checkpoint.shards import hash_of
from bigtrain.errors import CheckpointError, CorruptError
from bigtrain.state import whole
from tests.helpers.checkpoints import cut, on_ranks, saved, some_tensors
from tests.helpers.faulty import FULL

TENSORS = some_tensors(3)
SOURCES = sorted(Path(bigtrain.checkpoint.__file__).parent.glob("*.py"))


def seal(inner):
    """A manifest whose hash is right, whatever is in it."""
    return b'{"xxh3_128":"' + hash_of(inner).hex().encode() + b'","manifest":' + inner + b"}\n"


def rewrite(path, change):
    """Change the manifest's content and make its hash right."""
    content = json.loads((path / "manifest.json").read_text())["manifest"]
    changed = change(content)
    (path / "manifest.json").write_bytes(seal(json.dumps(content if changed is None else changed).encode()))


def read_everything(path):
    with open_checkpoint(path) as reader:
        for (kind, name), spec in reader.index.items():
            reader.read_into(kind, name, whole(spec.shape), torch.empty(spec.shape, dtype=spec.dtype))
        for rank in range(reader.num_writers):
            reader.own(rank)


def assert_refused(path):
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptError) as caught:
        read_everything(path)
    assert str(path) in caught.value.where
    assert not verify(path).is_good
    assert time.monotonic() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path, 3, cut("rows", TENSORS, 2))


def weight(content):
    return content["tensors"]["weight"]["up"]


def listed(content, writers):
    del weight(content)["cut"]
    weight(content)["writers"] = writers


HUGE = 1 << 63
MANIFESTS = {
    "no object": lambda c: [],
    "another version": lambda c: c.update(version=2),
    "no step": lambda c: c.pop("step"),
    "negative step": lambda c: c.update(step=-1),
    "step in words": lambda c: c.update(step="3"),
    "true step": lambda c: c.update(step=True),
    "no shards": lambda c: c.update(shards=[]),
    "one shard": lambda c: c["shards"].pop(),
    "shards by name": lambda c: c.update(shards=["../../x"]),
    "a shard without a hash": lambda c: c["shards"][0].pop(),
    "a short hash": lambda c: c["shards"][0].__setitem__(2, "00"),
    "a huge header": lambda c: c["shards"].__setitem__(0, [HUGE - 1, HUGE - 1, "0" * 32]),
    "a large header": lambda c: c["shards"].__setitem__(0, [101 << 20, 101 << 20, "0" * 32]),
    "a header longer than its file": lambda c: c["shards"][0].__setitem__(1, c["shards"][0][0] + 1),
    "a header of nothing": lambda c: c["shards"][0].__setitem__(1, 0),
    "a huge state": lambda c: c["state"].__setitem__(0, 1 << 40),
    "no state": lambda c: c.pop("state"),
    "a huge shape": lambda c: weight(c).update(shape=[HUGE, HUGE]),
    "a shape that overflows": lambda c: weight(c).update(shape=[1 << 40, 1 << 40]),
    "a negative shape": lambda c: weight(c).update(shape=[-7, 5]),
    "a shape of many dimensions": lambda c: weight(c).update(shape=[1] * 100_000),
    "another shape": lambda c: weight(c).update(shape=[5, 7]),
    "a larger shape": lambda c: weight(c).update(shape=[8, 5]),
    "an unknown dtype": lambda c: weight(c).update(dtype="O"),
    "another dtype": lambda c: weight(c).update(dtype="I32"),
    "no cut": lambda c: weight(c).pop("cut"),
    "a cut by nothing": lambda c: weight(c).update(cut=[0, 20, 0]),
    "a cut into too many": lambda c: weight(c).update(cut=[0, 1, 1]),
    "a cut into far too many": lambda c: weight(c).update(shape=[1 << 61], cut=[0, 1, 1]),
    "a cut by a writer far away": lambda c: weight(c).update(cut=[1 << 61, 20, 20]),
    "a cut with the wrong writer": lambda c: weight(c).update(cut=[1, 35, 35]),
    "writers that are not there": lambda c: listed(c, [0, 2]),
    "only one of its writers": lambda c: listed(c, [0]),
    "a writer twice": lambda c: listed(c, [0, 1, 1]),
    "a negative writer": lambda c: listed(c, [-1]),
    "a tensor that is nowhere": lambda c: c["tensors"]["weight"].update(other=dict(weight(c))),
    "tensors in a list": lambda c: c.update(tensors=[]),
    "a kind in a list": lambda c: c["tensors"].update(weight=[]),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_hostile_manifests_are_refused(path, change):
    rewrite(path, change)
    assert_refused(path)


@pytest.mark.parametrize(
    "inner",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"step":1,"step":2}',
        b'{"step":NaN}',
        b'{"step":' + b"9" * 10_000 + b"}",
        b"\xff",
        b"",
    ],
    ids=["deep", "a key twice", "nan", "a long number", "no text", "empty"],
)
def test_hostile_json_is_refused(path, inner):
    (path / "manifest.json").write_bytes(seal(inner))
    assert_refused(path)


def test_a_manifest_of_gigabytes_is_not_read(path):
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert_refused(path)


def put_header(path, text, *, data=None):
    """Give a shard another header, with lengths and hashes that are right in the manifest."""
    shard = path / "shard-00000.safetensors"
    raw = shard.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = len(text).to_bytes(8, "little") + text
    shard.write_bytes(header + (raw[length:] if data is None else data))
    known = [shard.stat().st_size, len(header), hash_of(header).hex()]
    rewrite(path, lambda content: content["shards"].__setitem__(0, known))


def header_of(path):
    raw = (path / "shard-00000.safetensors").read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


UP = "weight:up[0:4/7,0:5/5]"


def renamed(header, title):
    header[title] = header.pop(UP)


def last_of(header):
    return max((h for name, h in header.items() if name != "__metadata__"), key=lambda h: h["data_offsets"])


HEADERS = {
    "overlap": lambda h: last_of(h).update(data_offsets=[n - 8 for n in last_of(h)["data_offsets"]]),
    "a hole": lambda h: h[UP].update(data_offsets=[n + 8 for n in h[UP]["data_offsets"]]),
    "negative": lambda h: h[UP].update(data_offsets=[-80, 0]),
    "huge": lambda h: h[UP].update(data_offsets=[HUGE, HUGE + 80]),
    "backwards": lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1]),
    "offsets in words": lambda h: h[UP].update(data_offsets=["0", "80"]),
    "a dtype that is none": lambda h: h[UP].update(dtype=["F32"]),
    "another shape": lambda h: h[UP].update(shape=[5, 4]),
    "no shape": lambda h: h[UP].pop("shape"),
    "out of its tensor": lambda h: renamed(h, "weight:up[4:8/7,0:5/5]"),
    "from the end to the beginning": lambda h: renamed(h, "weight:up[4:0/7,0:5/5]"),
    "of another tensor": lambda h: renamed(h, "weight:down[0:4/7,0:5/5]"),
    "elsewhere in its tensor": lambda h: renamed(h, "weight:up[1:5/7,0:5/5]"),
    "no name": lambda h: renamed(h, "up"),
    "overflow": lambda h: renamed(h, "weight:up[0:4/9000000000000000000,0:5/9000000000000000000]"),
    "many dimensions": lambda h: renamed(h, "weight:up[" + ",".join(["0:1/1"] * 100_000) + "]"),
    "no hashes": lambda h: h["__metadata__"].pop("xxh3_128"),
    "short hashes": lambda h: h["__metadata__"].update(xxh3_128="00"),
    "hashes that are none": lambda h: h["__metadata__"].update(xxh3_128="x" * len(h["__metadata__"]["xxh3_128"])),
    "other hashes": lambda h: h["__metadata__"].update(xxh3_128="0" * len(h["__metadata__"]["xxh3_128"])),
    "other chunks": lambda h: h["__metadata__"].update(chunk_bytes="1"),
    "not ours": lambda h: h.pop("__metadata__"),
    "metadata in a list": lambda h: h.update(__metadata__=[]),
    "the rank's own is no JSON": lambda h: h["__metadata__"].update(rank="{"),
    "the rank's own is deep": lambda h: h["__metadata__"].update(rank="[" * 100_000),
    "the rank's own is no code": lambda h: h["__metadata__"].update(rank='{"$eval": "1"}'),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_hostile_headers_are_refused(path, change, request):
    header = header_of(path)
    change(header)
    put_header(path, json.dumps(header).encode())
    if "own" in request.node.name:  # every byte is what was written, if nonsense
        with pytest.raises(CorruptError):
            read_everything(path)
    else:
        assert_refused(path)


@pytest.mark.parametrize(
    "text", [b"[]", b'{"a":1,"a":2}', b"[" * 100_000, b"", b"{}"], ids=["list", "twice", "deep", "none", "empty"]
)
def test_headers_that_are_none_are_refused(path, text):
    put_header(path, text)
    assert_refused(path)


@settings(max_examples=100_000 if FULL else 300, deadline=None)
@given(st.data())
def test_parsers_raise_nothing_but_a_value_error(data):
    """Bytes inserted, taken away and changed, in a manifest whose hash is right and in a header."""
    inner = json.dumps(
        {
            "format": "bigtrain",
            "version": 1,
            "step": 3,
            "state": [2, "0" * 32],
            "shards": [[90, 80, "0" * 32]],
            "tensors": {"weight": {"w": {"dtype": "F32", "shape": [2], "cut": [0, 2, 2]}}},
        }
    ).encode()
    entry = {"weight:w[0:2/2]": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    metadata = {"bigtrain": "1", "chunk_bytes": str(1 << 20), "xxh3_128": "0" * 32, "rank": "{}"}
    header = json.dumps({"__metadata__": metadata, **entry}).encode()
    decode_manifest(seal(inner))
    decode_header(len(header).to_bytes(8, "little") + header, 8)
    words = [
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"-",
        b"1e99",
        b"null",
        b"9" * 30,
        b"\x00",
        b"\xf0",
        b"true",
        b":",
        b"/",
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(inner)))
        inner = inner[:at] + data.draw(st.sampled_from(words)) + inner[at + data.draw(st.integers(0, 5)) :]
        at = data.draw(st.integers(0, len(header)))
        header = header[:at] + data.draw(st.sampled_from(words)) + header[at + data.draw(st.integers(0, 5)) :]
    for decode, raw in (
        (decode_manifest, (seal(inner),)),
        (decode_header, (len(header).to_bytes(8, "little") + header, 8)),
    ):
        with contextlib.suppress(ValueError):
            decode(*raw)


# ---- pickles ----------


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


def test_a_pickle_under_any_name_is_never_run(path, tmp_path):
    bomb, canary = pickle.dumps(Bomb(tmp_path / "canary")), tmp_path / "canary"
    torch.save(Bomb(canary), tmp_path / "bomb.pt")
    names = [file.name for file in path.iterdir()]
    for raw in (bomb, (tmp_path / "bomb.pt").read_bytes()):
        for name in names:
            right = (path / name).read_bytes()
            (path / name).write_bytes(raw)
            assert_refused(path)
            (path / name).write_bytes(right)
        for name in (".metadata", "model.pt", "optimizer.bin", "rng.pth", "state.pkl", "__0_0.distcp"):
            (path / name).write_bytes(raw)
            (path.parent / name).write_bytes(raw)
    read_everything(path)
    assert diff(path, path).differences == ()
    assert verify(path).strangers == (".metadata", "__0_0.distcp", "model.pt", "optimizer.bin", "rng.pth", "state.pkl")
    (reader,) = on_ranks(1, lambda ranks: load_newest(ranks, path.parent, lambda reader: None))
    assert reader.step == 3
    assert not canary.exists()
    pickle.loads(bomb).close()
    assert canary.exists()  # the bomb was a real one


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_package_runs_what_it_reads(source):
    tree = ast.parse(source.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "importlib", "subprocess", "shutil"}
    assert not {name for name in imported if name.split(".")[0] in forbidden}
    unsafe = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "numpy.load", "np.load", "yaml.load"}
    assert not unsafe & set(calls(tree))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_only_one_module_touches_files(source):
    if source.name == "files.py":
        return
    tree = ast.parse(source.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"os", "io", "shutil", "tempfile", "mmap", "glob", "os.path"}
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    on_paths = {
        "read_bytes",
        "read_text",
        "write_bytes",
        "write_text",
        "unlink",
        "mkdir",
        "rmdir",
        "iterdir",
        "glob",
        "rglob",
        "stat",
        "lstat",
        "touch",
        "replace_with",
        "symlink_to",
        "hardlink_to",
        "is_file",
        "is_dir",
        "resolve",
    }
    assert not named & on_paths
    assert "open" not in set(calls(tree))


def test_a_link_in_place_of_the_folder_is_refused(path, tmp_path):
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    (error,) = on_ranks(1, lambda ranks: load_newest(ranks, tmp_path, lambda reader: None))
    assert isinstance(error, CheckpointError)
