"""A checkpoint of ours as what other libraries open with their own tools, one tensor at a time.

What is written stands under a temporary name until it is whole, so a broken-off export leaves nothing that looks like
one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import CheckpointReader
from bigtrain.checkpoint.shards import DTYPES
from bigtrain.config.loader import loads
from bigtrain.doors import names
from bigtrain.doors.kept import as_text
from bigtrain.doors.memory import tensor_for
from bigtrain.errors import CheckpointError, SaveError, SetupError
from bigtrain.models import build
from bigtrain.state import BUFFER, EMA, WEIGHT, whole

Key = tuple[str, str]
Progress = Callable[[int], None]

FORMS = ("hf", "safetensors", "torch", "dcp", "deepspeed")

_LARGEST_SHARD = 5 * 10**9  # bytes of a file of a Hugging Face folder, its library's own default


def export(
    reader: CheckpointReader,
    out: Path,
    form: str,
    progress: Progress = lambda count: None,
    *,
    averaged: bool = False,
) -> None:
    """Write a checkpoint in another form.

    Args:
        reader: The checkpoint.
        out: The file or folder to make; it must not be there.
        form: hf, safetensors, torch, dcp or deepspeed; the last three hold the optimizer's state as well.
        progress: Told how many bytes have been written since the last time.
        averaged: Write the moving averages of weights (optim.ema) in their place.

    Raises:
        CheckpointError: Where something is there, this checkpoint cannot be given that form, or has no averages.
        SaveError: Where it cannot be written.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} is there already", where=str(out), remedy="give another name, or remove it")
    if averaged:
        reader.check_averages()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _export(_Watched(reader, progress, averaged=averaged), out, form)
    except OSError as error:
        raise SaveError(
            f"cannot write {out}: {error.strerror or error}",
            where=str(out),
            remedy="give another place, with room for it; nothing was left behind",
        ) from error


def _export(reader: _Watched, out: Path, form: str) -> None:
    aside = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        _WRITERS[form](reader, aside)
        os.replace(aside, out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        with suppress(OSError):
            aside.unlink(missing_ok=True)


class _Watched:
    """A reader that tells how far it has come, and may have averages in the place of weights."""

    def __init__(self, reader: CheckpointReader, progress: Progress, *, averaged: bool) -> None:
        self._reader, self._progress = reader, progress
        self._averaged = {name for kind, name in reader.index if kind == EMA} if averaged else set()
        self.index = {key: spec for key, spec in reader.index.items() if not (averaged and key[0] == EMA)}
        self.path, self.hyper, self.extra, self.step = reader.path, reader.hyper, reader.extra, reader.step

    def read_into(self, kind: str, name: str, box: Any, out: torch.Tensor) -> None:
        source = EMA if kind in (WEIGHT, BUFFER) and name in self._averaged else kind
        self._reader.read_into(source, name, box, out)
        self._progress(out.nbytes)

    def whole(self, key: Key) -> torch.Tensor:
        """One tensor, whole."""
        spec = self.index[key]
        out = tensor_for(spec)
        self.read_into(*key, whole(spec.shape), out)
        return out


def _weights(reader: _Watched) -> list[Key]:
    return [key for key in reader.index if key[0] in (WEIGHT, BUFFER)]


# ---- safetensors and Hugging Face ----------


def _write_safetensors(reader: _Watched, path: Path, keys: list[Key] | None = None, rename: Any = str) -> None:
    """A file of the format (its documentation): header, then tensors in the order of the header, aligned by size."""
    held = sorted(keys or _weights(reader), key=lambda key: -reader.index[key].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key in held:
        shape, dtype = reader.index[key]
        end = place + dtype.itemsize * torch.Size(shape).numel()
        header[rename(key[1])] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for key in held:
            file.write(reader.whole(key).reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_hugging_face(reader: _Watched, path: Path) -> None:
    config = loads(reader.extra["config"]) if "config" in reader.extra else None
    if config is None or config.model.name != "gpt":
        raise CheckpointError(
            f"{reader.path} is not of a model that transformers knows: "
            f"{'it was brought in' if config is None else config.model.name}",
            where=str(reader.path),
            remedy="export it --to safetensors",
        )
    with torch.device("meta"):
        model = build("gpt", config.model.args)
    path.mkdir()
    described = names.llama_config({**config.model.args, **_args_of(model)})
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shards = list(_in_shards(reader))
    if len(shards) == 1:
        _write_safetensors(reader, path / "model.safetensors", shards[0], names.to_llama)
        return
    listed: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(reader, path / name, keys, names.to_llama)
        listed |= {names.to_llama(key[1]): name for key in keys}
    total = sum(_bytes(reader, key) for keys in shards for key in keys)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _args_of(model: Any) -> dict[str, Any]:
    """Every argument of a gpt, those that were left to their defaults included."""
    block = model.layers[0]
    return {
        "mlp_width": block.mlp.up_proj.out_features,
        "heads": block.self_attn.heads,
        "kv_heads": block.self_attn.kv_heads,
        "tied": model.lm_head.weight is model.embed_tokens.weight,
        "rope_theta": float(model.rotary.theta),
        "norm_eps": block.input_layernorm.eps,
        "dropout": model.dropout.p,
    }


def _in_shards(reader: _Watched) -> Iterator[list[Key]]:
    keys: list[Key] = []
    size = 0
    for key in _weights(reader):
        if keys and size + _bytes(reader, key) > _LARGEST_SHARD:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += _bytes(reader, key)
    yield keys


def _bytes(reader: _Watched, key: Key) -> int:
    shape, dtype = reader.index[key]
    return dtype.itemsize * torch.Size(shape).numel()


# ---- torch and DCP ----------


def _write_torch(reader: _Watched, path: Path) -> None:
    from bigtrain.doors.torch_files import write

    is_model = {key: ("model", key[1]) if key[0] in (WEIGHT, BUFFER) else ("optimizer", key[1], key[0])
                for key in reader.index}  # fmt: skip
    content: dict[str, Any] = {
        "step": reader.step,
        "hyper": {name: dict(values) for name, values in reader.hyper.items()},
        "buffers": [name for kind, name in reader.index if kind == BUFFER],
        "bigtrain": as_text(reader.extra),
    }
    write(path, content, is_model, reader)


def _write_dcp(reader: _Watched, path: Path) -> None:
    from bigtrain.doors.dcp import write

    write(path, reader)


def _write_deepspeed(reader: _Watched, path: Path) -> None:
    try:
        from bigtrain.doors.deepspeed import write
    except ImportError as error:
        remedy = 'pip install "bigtrain[deepspeed]"'
        raise SetupError("DeepSpeed is not installed", where="--to deepspeed", remedy=remedy) from error
    write(path, reader)


_WRITERS: Mapping[str, Callable[[_Watched, Path], None]] = {
    "hf": _write_hugging_face,
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "dcp": _write_dcp,
    "deepspeed": _write_deepspeed,
}
