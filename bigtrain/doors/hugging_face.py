"""A checkpoint of ours as a folder that transformers opens: our gpt as a Llama, a model hf/<folder> as what it was.

Beside the weights there lie a config.json and, where the run named a tokenizer, its files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bigtrain.catalogue import DATA_OF_TEXT, HUGGING_FACE, hugging_face_folder
from bigtrain.config.loader import dump, loads
from bigtrain.config.schema import Config
from bigtrain.doors import names
from bigtrain.doors.streaming import Key, Watched, bytes_of, weights_in, write_safetensors
from bigtrain.errors import CheckpointError
from bigtrain.models import build

_LARGEST_SHARD = 5 * 10**9  # bytes of a file, the library's own default
_OF_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "generation_config.json"),
)


def write(reader: Watched, path: Path) -> None:
    """Write the folder.

    Raises:
        CheckpointError: Where transformers does not know the model.
    """
    config = loads(reader.extra["config"]) if "config" in reader.extra else None
    folder = hugging_face_folder(config.model.name) if config else None
    if config is None or (config.model.name != "gpt" and folder is None):
        raise CheckpointError(
            f"{reader.path} is not of a model that transformers knows: "
            f"{'it was brought in' if config is None else config.model.name}",
            where=str(reader.path),
            remedy="export it --to safetensors",
        )
    with torch.device("meta"):
        model: Any = build(config.model.name, config.model.args)
    described = _of_folder(model, reader) if folder else _of_gpt(model, config, reader)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer(config, folder, path)
    _write_weights(reader, path, str if folder else names.to_llama)


def moved(extra: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps beside the state, of a model hf/<folder> whose folder lies elsewhere now."""
    config = loads(extra["config"]) if "config" in extra else None
    if config is None or hugging_face_folder(config.model.name) is None or not folder.is_dir():
        return dict(extra)
    model = config.model.model_copy(update={"name": f"{HUGGING_FACE}{folder}"})
    return {**extra, "config": dump(config.model_copy(update={"model": model}))}


def _of_gpt(model: Any, config: Config, reader: Watched) -> dict[str, Any]:
    return names.llama_config({**config.model.args, **_args_of(model)}, _dtype(reader))


def _of_folder(model: Any, reader: Watched) -> dict[str, Any]:
    """The config.json of a model hf/<folder>: the folder's, with its new head and the names of the classes."""
    described = model.config
    described.architectures = [type(model).__name__]
    classes = reader.extra.get("class_names") or []
    if hasattr(model.config, "num_labels") and len(classes) == model.config.num_labels:
        described.id2label = dict(enumerate(classes))
        described.label2id = {name: number for number, name in enumerate(classes)}
    found: dict[str, Any] = json.loads(described.to_json_string(use_diff=False))
    return {**found, "dtype": _dtype(reader)}


def _dtype(reader: Watched) -> str:
    """What most of the weights are kept in."""
    sizes: dict[str, int] = {}
    for key in weights_in(reader):
        name = str(reader.index[key].dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + bytes_of(reader, key)
    return max(sizes, key=lambda name: sizes[name], default="float32")


def _copy_tokenizer(config: Config, folder: str | None, path: Path) -> None:
    named = config.data.args.get("tokenizer") if config.data.name in DATA_OF_TEXT else None
    source = Path(str(named or folder)).expanduser()
    if source.is_dir():
        for pattern in _OF_TOKENIZERS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, path / file.name)


def _write_weights(reader: Watched, path: Path, rename: Callable[[str], str]) -> None:
    shards = list(_in_shards(reader))
    if len(shards) == 1:
        write_safetensors(reader, path / "model.safetensors", shards[0], rename)
        return
    listed: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(reader, path / name, keys, rename)
        listed |= {rename(key[1]): name for key in keys}
    total = sum(bytes_of(reader, key) for keys in shards for key in keys)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_shards(reader: Watched) -> Iterator[list[Key]]:
    keys: list[Key] = []
    size = 0
    for key in weights_in(reader):
        if keys and size + bytes_of(reader, key) > _LARGEST_SHARD:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += bytes_of(reader, key)
    yield keys


def _args_of(model: Any) -> Mapping[str, Any]:
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
