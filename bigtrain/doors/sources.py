"""Whatever holds weights, opened as a reader of named tensors: any box of any of them, nothing else of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bigtrain.checkpoint import CheckpointReader, newest
from bigtrain.checkpoint.files import DISK, Files
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.checkpoint.shards import TORCH_DTYPES
from bigtrain.data.paths import missing
from bigtrain.doors import names
from bigtrain.doors.base import Base, Left, base_of, digests_in
from bigtrain.errors import CheckpointError, CorruptError, ReadError, StateError
from bigtrain.state import WEIGHT, Box, TensorSpec

Key = tuple[str, str]

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_PEFT = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LARGEST_JSON = 64 << 20


class ForeignReader(Protocol):
    """A `bigtrain.state.Reader` of other people's files, or of ours."""

    form: str
    path: Path

    @property
    def index(self) -> Mapping[Key, TensorSpec]:
        """What there is to read, by kind and name."""

    @property
    def hyper(self) -> Mapping[str, Mapping[str, Any]]:
        """Every hyperparameter by parameter name; empty where the form knows none."""

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` (the box's size) with that part of the tensor; another dtype is converted to."""

    def close(self) -> None:
        """Close every file."""


def open_weights(path: str | Path, *, allow_pickle: bool = False, as_gpt: bool = True) -> ForeignReader:
    """Open what a path leads to: it is found out by looking, never by trying to load.

    Args:
        path: A checkpoint of ours, a run folder (its newest checkpoint), a .safetensors file, a .pt, .pth or .bin
            file, a Hugging Face folder, sharded or not.
        allow_pickle: Read a .pt file that holds more than tensors and plain values. It can run any code.
        as_gpt: Give a Llama's tensors the names of our gpt.

    Returns:
        Its tensors by (kind, name); of foreign files every tensor is a weight.

    Raises:
        CheckpointError: Where there is nothing, or nothing that is known.
        CorruptError: Where a file is not what it says.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, as_gpt=as_gpt)
    if not path.is_file():
        remedy = missing(path, "the path of a checkpoint, a run's folder or weights", where="").remedy
        raise CheckpointError(f"there is no file or folder {path}", remedy=remedy)
    if path.suffix == ".safetensors":
        return SafetensorsReader(path, [path], lambda name: name)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        from bigtrain.doors.torch_files import TorchReader

        return TorchReader(path, allow_pickle=allow_pickle)
    raise CheckpointError(
        f"{path} is neither .safetensors nor .pt, .pth, .bin, .ckpt",
        remedy="give a checkpoint, a run folder, a Hugging Face folder or one of these files",
    )


def _open_folder(path: Path, *, as_gpt: bool) -> ForeignReader:
    if (path / MANIFEST).exists():
        return open_whole(path)
    for folder in (path / "checkpoints", path):  # a run, or a folder of checkpoints, as `ckpt import` makes
        found = newest(folder) if folder.is_dir() else None
        if found:
            return open_whole(found)
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"the run {path} has no checkpoint", remedy="give a run that has saved one")
    if (path / _INDEX).exists() or (path / _SINGLE).exists():
        return open_hugging_face(path, as_gpt=as_gpt)
    if (path / ".metadata").exists():
        raise CheckpointError(
            f"{path} is a DCP folder, whose table of contents is a pickle",
            remedy="bring it in first: bigtrain ckpt import --from dcp --allow-pickle",
        )
    if (path / "pytorch_model.bin").exists():
        return open_weights(path / "pytorch_model.bin")
    if any((path / name).exists() for name in _PEFT):
        raise CheckpointError(
            f"{path} holds an adapter of peft, and not the model that it belongs to",
            remedy="begin with that model; or merge the two first, in Python:\n"
            f"peft.AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(OUT)",
        )
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{path} is no checkpoint, run or Hugging Face folder: it holds {held}",
        remedy="give a folder with manifest.json, checkpoints/ or model.safetensors",
    )


class NativeReader(CheckpointReader):
    """A checkpoint of ours."""

    form = "checkpoint"


class BasedReader(NativeReader):
    """A checkpoint that leaves frozen weights in another file, and reads as if it had them.

    Args:
        path: The checkpoint's folder.
        base: What it leaves out.
        weights: The file that has it.
        files: The file system of the checkpoint.
    """

    def __init__(self, path: Path, base: Base, weights: ForeignReader, files: Files = DISK) -> None:
        super().__init__(path, files)
        self.base, self._weights = base, weights
        left = {(WEIGHT, name): left.spec for name, left in base.tensors.items()}
        self.index: Mapping[Key, TensorSpec] = {**left, **self.index}

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor, whichever file has it."""
        if kind != WEIGHT or name not in self.base.tensors:
            super().read_into(kind, name, box, out)
            return
        try:
            self._weights.read_into(*self.base.tensors[name].source, box, out)
        except (CheckpointError, OSError, RuntimeError) as error:  # it says nothing about the checkpoint
            raise ReadError(f"{name} cannot be read from {self.base.path}: {error}", where=str(self.path)) from error

    def close(self) -> None:
        """Close every file."""
        super().close()
        self._weights.close()


def open_whole(
    path: Path, files: Files = DISK, *, instead: Path | None = None, verifies: bool = True
) -> NativeReader | BasedReader:
    """Open a checkpoint with the weights that it leaves in another file, if it leaves any.

    Args:
        path: Its folder.
        files: The file system.
        instead: Where those weights are, should they not be where they were.
        verifies: Whether they are read and compared now, which whoever loads all of them can do better.

    Raises:
        CheckpointError: Where one of the two cannot be read; of the weights never as damage to the checkpoint.
        StateError: Where the weights are others than those that were left out.
    """
    reader = NativeReader(path, files)
    try:
        base = base_of(reader.extra)
        if base is None:
            return reader
        base = base.found(instead)
        weights = _open_base(base, path)
    finally:
        reader.close()
    whole = BasedReader(path, base, weights, files)
    try:
        if verifies:
            base.check(digests_in(weights, base))
    except BaseException:
        whole.close()
        raise
    return whole


def _open_base(base: Base, path: Path) -> ForeignReader:
    remedy = "say where they are now: finetune.init_from=PATH, or model.name=hf/PATH of a model hf/<folder>\n"
    remedy += "(after --set of `bigtrain predict`); --base PATH of `bigtrain ckpt export`"
    try:
        weights = open_weights(base.path, as_gpt=base.as_gpt)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} leaves {len(base.tensors)} frozen weights in {base.path}, which cannot be opened: {error.problem}",
            where=str(base.path),
            remedy=remedy,
        ) from error
    absent = [name for name, left in base.tensors.items() if not _has(weights, left)]
    if absent:
        weights.close()
        raise StateError(
            f"{path} leaves frozen weights in {base.path}, which does not have them: {', '.join(absent[:5])}",
            where=str(base.path),
            remedy=remedy,
        )
    return weights


def _has(weights: ForeignReader, left: Left) -> bool:
    return left.source in weights.index and weights.index[left.source].shape == left.spec.shape


class SafetensorsReader:
    """One or several .safetensors files, read by the format's own library.

    Args:
        path: What the user named.
        files: The files.
        rename: Our name of each tensor; None leaves it out.

    Raises:
        CorruptError: Where a file is not of the format, or a name comes twice.
    """

    form = "safetensors"

    def __init__(self, path: Path, files: list[Path], rename: Callable[[str], str | None]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.hyper: Mapping[str, Mapping[str, Any]] = {}
        self.metadata: dict[str, str] = {}
        index: dict[Key, TensorSpec] = {}
        self._places: dict[Key, tuple[Any, str]] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CorruptError(
                    f"{file} is no safetensors file, or a damaged one: {error}",
                    where=str(file),
                    remedy=f"it has {file.stat().st_size:,} bytes: compare with where it comes from, and copy it again",
                ) from error
            self.metadata |= opened.metadata() or {}
            for theirs in opened.keys():  # noqa: SIM118 # it is no mapping
                name = rename(theirs)
                if name is None:
                    continue
                part = opened.get_slice(theirs)
                if part.get_dtype() not in TORCH_DTYPES:
                    raise CheckpointError(
                        f"{theirs} is {part.get_dtype()}, which is not read; it takes: {', '.join(TORCH_DTYPES)}",
                        where=str(file),
                        remedy="convert it, or leave it out",
                    )
                key = (WEIGHT, name)
                if key in index:
                    raise CorruptError(f"{name} is there twice", where=str(file))
                index[key] = TensorSpec(tuple(part.get_shape()), TORCH_DTYPES[part.get_dtype()])
                self._places[key] = (opened, theirs)
        self.index: Mapping[Key, TensorSpec] = index

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor."""
        if (kind, name) not in self._places:
            raise CheckpointError(f"{self.path} has no {kind} {name}", where=str(self.path))
        opened, theirs = self._places[kind, name]
        with torch.no_grad():
            if box.size:
                out.copy_(opened.get_slice(theirs)[box.slices])
            else:
                out.copy_(opened.get_tensor(theirs))

    def close(self) -> None:
        """Close every file."""
        self._places.clear()


class HuggingFaceReader(SafetensorsReader):
    """A Hugging Face folder; a Llama's names become those of our gpt.

    Attributes:
        config: Its config.json; empty where there is none.
    """

    form = "hf"
    config: Mapping[str, Any]


def open_hugging_face(path: Path, *, as_gpt: bool = True) -> HuggingFaceReader:
    """Open a Hugging Face folder, sharded or not.

    Args:
        path: The folder.
        as_gpt: Give a Llama's tensors the names of our gpt.

    Raises:
        CheckpointError: Where a shard is missing, or does not hold what the index says.
        CorruptError: Where a file is not what it says.
    """
    config = _read_json(path / _CONFIG) if (path / _CONFIG).exists() else {}
    files, listed = [path / _SINGLE], None
    if (path / _INDEX).exists():
        listed = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(_is_plain(name) for name in listed.values()):
            raise CorruptError(
                f"{_INDEX} lists no files of this folder", where=str(path / _INDEX), remedy="copy the folder anew"
            )
        files = [path / name for name in sorted(set(listed.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}", remedy="copy the whole folder")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"the weights of {path} are quantised, which is not read",
            where=str(path / _CONFIG),
            remedy="take the folder of the model in bf16 or fp32",
        )
    rename: Callable[[str], str] = names.from_llama if as_gpt and names.is_llama(config) else str
    reader = HuggingFaceReader(path, files, rename)
    reader.config = config
    absent = [name for name in listed or () if (WEIGHT, rename(name)) not in reader.index]
    if absent:
        raise CheckpointError(f"{path} lacks tensors that its index lists: {', '.join(absent[:5])}")
    return reader


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_JSON:
        raise CorruptError(f"{path.name} is impossibly large", where=str(path), remedy="copy the folder anew")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is no JSON: {error}", where=str(path), remedy="copy the folder anew") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path} holds no object", where=str(path), remedy="copy the folder anew")
    return value
