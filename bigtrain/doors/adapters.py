"""A checkpoint with an adapter in the forms of others: its weights with the adapter merged in, or peft's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain.catalogue import hugging_face_folder
from bigtrain.config.loader import dump, loads
from bigtrain.config.schema import Adapter, Config
from bigtrain.doors.memory import tensor_for
from bigtrain.doors.streaming import Checkpoint, Progress, Watched, weights_in, write_safetensors
from bigtrain.errors import CheckpointError
from bigtrain.finetune.adapters import is_adapted, is_adapter, layer_of, lora_config, merged, pair_of, plain_name
from bigtrain.state import BUFFER, WEIGHT, Box, whole

_PEFT = "base_model.model."  # what its names begin with
_HEADS = ("classifier", "score")  # which it saves by itself with every adapter of a classification


def adapter_of(extra: Mapping[str, Any]) -> Adapter | None:
    """The adapter of the run that saved a checkpoint; None where it had none, or nothing is known of it."""
    return loads(extra["config"]).finetune.adapter if "config" in extra else None


class Merged(Watched):
    """The weights of the model without an adapter that computes what the one with it does; nothing of the optimizer."""

    def __init__(self, reader: Checkpoint, progress: Progress, *, averaged: bool) -> None:
        super().__init__(reader, progress, averaged=averaged)
        self._held = self.index
        kept = [key for key in self._held if key[0] in (WEIGHT, BUFFER) and not is_adapter(key[1])]
        self._by_plain = {(kind, plain_name(name)): (kind, name) for kind, name in kept}
        self.index = {plain: self._held[key] for plain, key in self._by_plain.items()}
        self.hyper: Mapping[str, Mapping[str, Any]] = {}
        config = loads(reader.extra["config"])
        self._adapter = config.finetune.adapter
        plain_config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"adapter": None})})
        self.extra = {**self.extra, "config": dump(plain_config)}

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with the whole of a tensor."""
        key = self._by_plain[kind, name]
        assert box == whole(self.index[kind, name].shape)
        super().read_into(*key, box, out)
        if is_adapted(key[1]) and self._adapter is not None:
            first, second = (self._matrix(name) for name in pair_of(key[1]))
            transposed = layer_of(key[1]) in self.extra.get("transposed", ())
            out.copy_(merged(out, first, second, self._adapter, transposed=transposed))

    def _matrix(self, name: str) -> Tensor:
        spec = self._held[WEIGHT, name]
        out = tensor_for(spec)
        super().read_into(WEIGHT, name, whole(spec.shape), out)
        return out


def write_peft(reader: Watched, path: Path) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained` opens: the adapter, and what trained beside it.

    Raises:
        CheckpointError: Where the checkpoint has no adapter.
    """
    config = loads(reader.extra["config"]) if "config" in reader.extra else None
    adapter = config.finetune.adapter if config else None
    if config is None or adapter is None:
        raise CheckpointError(
            f"{reader.path} has no adapter", where=str(reader.path), remedy="export it --to hf or --to safetensors"
        )
    weights = [key for key in weights_in(reader) if key[0] == WEIGHT]
    targets = sorted({layer_of(name) for _, name in weights if is_adapter(name)})
    beside = {_module_of(name) for name in reader.hyper if not is_adapter(name)}
    if _task_of(config) == "SEQ_CLS":
        beside |= {_module_of(name) for _, name in weights} & {*_HEADS}
    modules = sorted(beside)
    described = lora_config(
        adapter,
        targets,
        modules_to_save=modules or None,
        base_model_name_or_path=_base_of(config),
        task_type=_task_of(config),
        inference_mode=True,
    )
    path.mkdir()
    described.save_pretrained(path)
    pairs = [key for key in weights if is_adapter(key[1])]
    others = [key for key in weights if not is_adapter(key[1]) and _module_of(key[1]) in modules]
    write_safetensors(reader, path / "adapter_model.safetensors", [*pairs, *others], _peft_name)


def _module_of(name: str) -> str:
    """The part of the model that peft saves as one: a head whole, of all else the parameter's own module."""
    plain = plain_name(name)
    head = plain.partition(".")[0]
    return head if head in _HEADS else plain.rpartition(".")[0]


def _peft_name(name: str) -> str:
    return _PEFT + plain_name(name).replace(".default.weight", ".weight")


def _base_of(config: Config) -> str | None:
    folder = hugging_face_folder(config.model.name)
    return str(Path(folder).expanduser().absolute()) if folder else config.begins_with


def _task_of(config: Config) -> str | None:
    if hugging_face_folder(config.model.name) is None:
        return None
    return "CAUSAL_LM" if config.task.name == "causal_lm" else "SEQ_CLS"
