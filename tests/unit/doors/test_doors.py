"""What is exported opens with the other side's own tools, and comes back to the last bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import bigtrain
from bigtrain import models
from bigtrain.checkpoint import CheckpointReader, Ranks, diff, find, open_checkpoint, save
from bigtrain.dist import World
from bigtrain.doors import open_weights
from bigtrain.doors.exporting import export
from bigtrain.doors.incoming import bring_in
from bigtrain.errors import CheckpointError, CorruptError, SaveError
from bigtrain.state import EngineState, Piece, whole
from tests.helpers.checkpoints import in_a_fork
from tests.helpers.resuming import config

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled.*:UserWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Three steps of a small gpt, tied, with a frozen part and two groups."""
    folder = tmp_path_factory.mktemp("run")
    return find(bigtrain.train(config(folder), ["train.steps=3"]).path / "checkpoints")[0]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    run = bigtrain.train(config(folder), ["train.steps=2", "model.args.tied=false", "model.args.rope_theta=500.0"])
    return find(run.path / "checkpoints")[0]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """As the first, with moments in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    changes = ["train.steps=3", "optim.moments=bf16", "optim.args.betas=[0.9, 0.95]"]
    return find(bigtrain.train(config(folder), changes).path / "checkpoints")[0]


@pytest.fixture(params=["checkpoint", "narrow"])
def trained(request) -> Path:
    return request.getfixturevalue(request.param)


def exported(checkpoint: Path, out: Path, form: str) -> Path:
    with open_checkpoint(checkpoint) as reader:
        export(reader, out, form)
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]  # nothing is left beside it
    return out


def whole_tensor(reader: CheckpointReader, kind: str, name: str) -> torch.Tensor:
    spec = reader.index[kind, name]
    out = torch.empty(spec.shape, dtype=spec.dtype)
    reader.read_into(kind, name, whole(spec.shape), out)
    return out


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(checkpoint) as reader:
        return {name: whole_tensor(reader, kind, name) for kind, name in reader.index if kind == "weight"}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_safetensors_library_reads_it(checkpoint, tmp_path):
    assert_same(load_file(exported(checkpoint, tmp_path / "w.safetensors", "safetensors")), weights(checkpoint))


@pytest.mark.parametrize("which", ["checkpoint", "untied"])
def test_transformers_opens_it_with_equal_logits(which, tmp_path, request):
    from transformers import LlamaForCausalLM

    path = request.getfixturevalue(which)
    theirs = LlamaForCausalLM.from_pretrained(exported(path, tmp_path / "hf", "hf")).eval()
    args = {**config(tmp_path)["model"]["args"], "tied": which == "checkpoint"}
    ours = models.build("gpt", args | ({} if args["tied"] else {"rope_theta": 500.0})).eval()
    ours.load_state_dict(weights(path) | ({"lm_head.weight": ours.lm_head.weight} if args["tied"] else {}))
    tokens = torch.randint(0, 257, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    back = bring_in(tmp_path / "hf", tmp_path / "in", "hf")
    assert_same(weights(back), weights(path))
    with open_checkpoint(back) as reader:
        assert models.build("gpt", reader.extra["model"]["args"]).context == 4


def test_a_llama_that_transformers_made_in_several_files(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=71, num_key_value_heads=2, max_position_embeddings=16, **sizes))
    theirs.eval().save_pretrained(tmp_path / "hf", max_shard_size="20kB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    with open_checkpoint(bring_in(tmp_path / "hf", tmp_path / "in", "hf")) as reader:
        ours = models.build("gpt", reader.extra["model"]["args"]).eval()
        ours.load_state_dict({name: whole_tensor(reader, kind, name) for kind, name in reader.index})
    tokens = torch.randint(0, 71, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    missing = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    missing.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"lacks {missing.name}"):
        open_weights(tmp_path / "hf")


def test_a_shard_without_a_tensor_that_the_index_lists_is_refused(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks tensors that its index lists: b"):
        open_weights(folder)
    index["weight_map"]["b"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="lists no files of this folder"):
        open_weights(folder)


def test_torch_loads_it_without_running_anything(trained, tmp_path):
    content = torch.load(exported(trained, tmp_path / "w.pt", "torch"), weights_only=True)
    assert_same(content["model"], weights(trained))
    with open_checkpoint(trained) as reader:
        assert content["step"] == 3
        assert content["hyper"] == reader.hyper
        for kind, name in reader.index:
            if kind not in ("weight", "buffer"):
                assert torch.equal(content["optimizer"][name][kind], whole_tensor(reader, kind, name))


def test_dcp_loads_it(trained, tmp_path):
    folder = exported(trained, tmp_path / "dcp", "dcp")
    expected = weights(trained)
    with open_checkpoint(trained) as reader:
        moments = {name: whole_tensor(reader, kind, name) for kind, name in reader.index if kind == "exp_avg"}
    state = {
        "model": {name: torch.empty_like(tensor) for name, tensor in expected.items()},
        "optimizer": {"state": {name: {"exp_avg": torch.empty_like(tensor)} for name, tensor in moments.items()}},
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert_same(state["model"], expected)
    assert_same({name: slots["exp_avg"] for name, slots in state["optimizer"]["state"].items()}, moments)


@pytest.mark.parametrize("form", ["torch", "dcp", "deepspeed"])
def test_what_comes_back_is_the_same_to_the_last_bit_and_goes_on(trained, tmp_path, form):
    out = exported(trained, tmp_path / "out" / f"x{'.pt' if form == 'torch' else ''}", form)
    back = bring_in(out, tmp_path / "in", form, allow_pickle=form != "torch")
    assert back.name == trained.name
    found = diff(trained, back)
    assert found.differences == ()
    with open_checkpoint(trained) as ours, open_checkpoint(back) as theirs:
        brought = theirs.extra.pop("brought_in")
        assert brought == {"from": str(out), "form": form}
        assert theirs.extra == ours.extra


@pytest.mark.parametrize("key", [("weight", "{}"), ("weight", "../../../{0.name}"), ("{}", "w")])
@pytest.mark.parametrize("name", ["outside", "", "..", "a/b", "nul\0", "x" * 260])
def test_no_name_leads_out_of_what_is_exported(tmp_path, key, name):
    """DeepSpeed's form has a folder for every parameter, and a hostile checkpoint chooses the names."""
    outside = tmp_path / "outside" if name == "outside" else Path(name)
    kind, name = (part.format(outside) for part in key)
    if "/" not in kind + name and kind != "weight":
        kind = f"{kind}/x"  # an empty kind cannot be saved
    tensors = {(kind, name): torch.zeros(2), ("weight", "v"): torch.zeros(3)}
    pieces = [Piece(n, k, tuple(t.shape), t.dtype, whole(t.shape), t, True) for (k, n), t in tensors.items()]
    path = save(Ranks(World()), tmp_path / "in", 1, EngineState(pieces, {}), extra={})
    before = sorted(tmp_path.rglob("*"))
    with open_checkpoint(path) as reader, pytest.raises(CheckpointError, match="none can be called"):
        export(reader, tmp_path / "out", "deepspeed")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dcp_folder_is_unpickled_once_and_not_for_every_tensor(checkpoint, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    out, seen = exported(checkpoint, tmp_path / "out" / "x", "dcp"), []
    read = FileSystemReader.read_metadata
    monkeypatch.setattr(FileSystemReader, "read_metadata", lambda *a, **k: seen.append(1) or read(*a, **k))
    assert diff(checkpoint, bring_in(out, tmp_path / "in", "dcp", allow_pickle=True)).differences == ()
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["dcp", "deepspeed"])
def test_what_is_missing_or_torn_is_not_brought_in(checkpoint, tmp_path, form):
    out = exported(checkpoint, tmp_path / "out" / "x", form)
    for file in [each for each in out.rglob("*") if each.is_file()]:
        if file.name in ("optimizer_state.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # for DeepSpeed itself
            continue
        raw = file.read_bytes()
        for torn in (None, b"", raw[: len(raw) // 2], raw[:-1]):
            file.unlink()
            if torn is not None:
                file.write_bytes(torn)
            with pytest.raises(CheckpointError) as caught:
                bring_in(out, tmp_path / "in", form, allow_pickle=True)
            assert str(out) in str(caught.value)
            assert list(tmp_path.glob("in/*")) == []
            file.write_bytes(raw)
    assert diff(checkpoint, bring_in(out, tmp_path / "in", form, allow_pickle=True)).differences == ()


@pytest.mark.parametrize("form", ["dcp", "deepspeed", "torch", "safetensors", "hf"])
def test_a_full_disk_is_said_whoever_writes(checkpoint, tmp_path, form):
    """Under a limit that the system itself enforces in the middle of a write."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with open_checkpoint(checkpoint) as reader, pytest.raises(SaveError, match="cannot write"):
            export(reader, tmp_path / "out" / "x.pt", form)
        assert list((tmp_path / "out").iterdir()) == []

    assert in_a_fork(limited) == 0


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["dcp", "torch", "import"])
def test_what_a_signal_breaks_off_leaves_nothing(tmp_path, to, signal_):
    tensors = {f"p{number}": torch.zeros(1000, 300) for number in range(200)}
    pieces = [Piece(n, "weight", tuple(t.shape), t.dtype, whole(t.shape), t, True) for n, t in tensors.items()]
    path = save(Ranks(World()), tmp_path / "run", 1, EngineState(pieces, {}), extra={})
    out = tmp_path / "out"
    out.mkdir()
    given = ["export", str(path), str(out / "x.pt"), "--to", to]
    if to == "import":
        save_file(tensors, tmp_path / "w.safetensors")
        given = ["import", str(tmp_path / "w.safetensors"), str(out), "--from", "safetensors"]
    process = subprocess.Popen([sys.executable, "-m", "bigtrain", "ckpt", *given], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(entry.stat().st_size for entry in out.rglob("*") if entry.is_file()):
        time.sleep(0.002)
    process.send_signal(signal_)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal_, said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("form", ["dcp", "deepspeed"])
def test_a_pickle_is_read_only_where_it_is_allowed(checkpoint, tmp_path, form):
    out = exported(checkpoint, tmp_path / "out" / "x", form)
    with pytest.raises(CheckpointError, match="pickle") as caught:
        bring_in(out, tmp_path / "in", form)
    assert "--allow-pickle" in caught.value.remedy
    assert not (tmp_path / "in").exists()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_planted_pickle_does_not_run(tmp_path):
    canary = tmp_path / "ran"
    for name in ("w.pt", "w.pth", "w.bin"):
        torch.save({"model": {"a": torch.zeros(2)}, "args": Canary(canary)}, tmp_path / name)
        with pytest.raises(CheckpointError, match="more than tensors and plain values") as caught:
            open_weights(tmp_path / name)
        assert "--allow-pickle" in caught.value.remedy
    assert not canary.exists()
    assert open_weights(tmp_path / "w.pt", allow_pickle=True).index.keys() == {("weight", "a")}
    assert canary.exists()  # what the user allowed


def test_what_is_there_is_never_overwritten(checkpoint, tmp_path):
    out = tmp_path / "w.safetensors"
    out.write_text("precious")
    with open_checkpoint(checkpoint) as reader, pytest.raises(CheckpointError, match="is there already"):
        export(reader, out, "safetensors")
    assert out.read_text() == "precious"


def test_a_broken_off_export_leaves_nothing(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged / checkpoint.name)
    shard = damaged / checkpoint.name / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-8] ^= 1  # of the last tensor, a step counter or a weight
    shard.write_bytes(raw)
    for form in ("torch", "dcp", "deepspeed"):
        with open_checkpoint(damaged / checkpoint.name) as reader, pytest.raises(Exception, match="is damaged"):
            export(reader, tmp_path / "out" / form, form)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.safetensors", b"", "no safetensors file"),
        ("w.safetensors", b"\xff" * 64, "no safetensors file"),
        ("w.pt", b"PK\x03\x04 torn", "no file of torch.save"),
        ("w.pt", b"123", "no file of torch.save"),
        ("w.zip", b"", "is neither"),
    ],
)
def test_what_is_no_weights_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_weights(tmp_path / name)


def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    path = exported(checkpoint, tmp_path / "x" / "w.safetensors", "safetensors")
    raw = path.read_bytes()
    for size in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(CorruptError, match="no safetensors file"):
            open_weights(path)


MISSED = 17  # an exit code


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp", "deepspeed"])
def test_memory_grows_with_the_largest_tensor_not_with_the_model(tmp_path, form):
    """A state of 400 MB out and in: at most its largest tensor and 256 MiB are held."""
    count, numel = 16, 25 << 18  # of 26 MB each

    def write() -> None:
        pieces = [
            Piece(f"layers.{n}.weight", "weight", (numel,), torch.float32, whole((numel,)), torch.randn(numel), True)
            for n in range(count)
        ]
        save(Ranks(World()), tmp_path, 1, EngineState(pieces, {}), extra={})

    def measure(attempt: str) -> None:
        out = tmp_path / attempt / f"out.{'pt' if form == 'torch' else form}"
        out.parent.mkdir()
        if form == "deepspeed":
            import deepspeed  # noqa: F401 # what it takes by itself does not count
        with Peak() as peak:
            with open_checkpoint(tmp_path / "step-00000001") as reader:
                export(reader, out, form)
            bring_in(out, tmp_path / attempt / "in", form, allow_pickle=True)
        assert peak.held < 4 * numel + (256 << 20), peak.held
        os._exit(0 if peak.held > 4 * numel / 2 else MISSED)  # on a busy machine the meter may sleep through it

    assert in_a_fork(write) == 0
    codes = (os.waitstatus_to_exitcode(in_a_fork(partial(measure, attempt))) for attempt in "abc")
    assert next((code for code in codes if code != MISSED), MISSED) == 0


class Peak:
    """The most memory that this process held; pages of mapped files, which the system can drop, do not count."""

    def __enter__(self):
        self._before, self._most, self._is_over = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._is_over.set()
        self._thread.join()
        self.held = self._most - self._before

    def _watch(self):
        while not self._is_over.wait(0.002):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def test_an_old_file_of_torch_is_read_without_a_pickle(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    reader = open_weights(tmp_path / "old.pt")
    out = torch.empty(4)
    reader.read_into("weight", "a", whole((4,)), out)
    assert torch.equal(out, torch.arange(4.0))


@pytest.mark.parametrize(
    "odd",
    [{"buffers": 5}, {"hyper": {"a": 3}}, {"step": -3}, {"step": 10**19}, {1: 2}, {"bigtrain": "[1"}],
)
def test_a_file_of_somebody_else_that_has_our_words_is_brought_in(tmp_path, odd):
    torch.save({"model": {"a": torch.ones(2), 1: torch.ones(1)}, **odd}, tmp_path / "w.pt")
    made = bring_in(tmp_path / "w.pt", tmp_path / "in", "torch")
    assert find(tmp_path / "in") == [made]
    with open_checkpoint(made) as reader:
        assert list(reader.index) == [("weight", "a")]


@pytest.mark.parametrize("below", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_below_a_word_that_many_use_are_found(tmp_path, below):
    torch.save({"epoch": 3, "optimizer_state_dict": {"state": {}}, below: {"a": torch.ones(2)}}, tmp_path / "w.pt")
    with closing(open_weights(tmp_path / "w.pt")) as reader:
        assert list(reader.index) == [("weight", "a")]


def test_weights_below_a_word_of_somebodys_own_are_said(tmp_path):
    torch.save({"epoch": 3, "net": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="dictionaries below 'net'"):
        open_weights(tmp_path / "w.pt")


def test_a_dtype_that_no_checkpoint_holds_is_refused(tmp_path):
    save_file({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="a is C64"):
        open_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"num_attention_heads": None}, "does not say num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_size": "16"}, "hidden_size='16'"),
        ({"rope_parameters": [1]}, "rope_theta="),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta='x'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"quantization_config": {"bits": 4}}, "are quantised, which is not read"),
    ],
)
def test_an_odd_description_of_a_llama_is_refused(checkpoint, tmp_path, odd, said):
    out = exported(checkpoint, tmp_path / "x" / "hf", "hf")
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, **odd}))
    with pytest.raises(CheckpointError, match=said):
        bring_in(out, tmp_path / "in", "hf")


def test_what_a_llama_does_not_say_is_what_transformers_takes():
    from transformers import LlamaConfig

    from bigtrain.doors.names import gpt_args

    sizes = {"vocab_size": 71, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made, taken = LlamaConfig(**sizes), gpt_args(sizes, "config.json")
    assert taken == {
        "vocab": 71,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "kv_heads": made.num_key_value_heads,
        "mlp_width": made.intermediate_size,
        "context": made.max_position_embeddings,
        "tied": made.tie_word_embeddings,
        "norm_eps": made.rms_norm_eps,
        "rope_theta": 10_000.0,
    }


def test_where_nothing_can_be_written_is_a_clear_error(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with open_checkpoint(checkpoint) as reader, pytest.raises(SaveError, match="cannot write"):
        export(reader, tmp_path / "file" / "w.pt", "torch")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with open_checkpoint(checkpoint) as reader, pytest.raises(CheckpointError, match="is there already"):
        export(reader, tmp_path / "link", "safetensors")


def test_a_mistyped_path_names_what_lies_near(tmp_path):
    (tmp_path / "resnet18.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "resnet19.pt")
    assert f"the path is right up to {tmp_path}, which holds resnet18.pt" in caught.value.remedy
