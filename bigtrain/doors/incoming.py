"""Other libraries' files as a checkpoint of ours, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint import Ranks, save
from bigtrain.dist import World
from bigtrain.doors import names
from bigtrain.doors.kept import from_text
from bigtrain.doors.memory import tensor_for
from bigtrain.doors.sources import ForeignReader, HuggingFaceReader, open_weights
from bigtrain.doors.torch_files import TorchReader
from bigtrain.errors import CheckpointError
from bigtrain.state import EngineState, Piece, TensorSpec, whole

Progress = Callable[[int], None]

FORMS = ("hf", "safetensors", "torch", "dcp", "deepspeed")


@dataclass(frozen=True, slots=True)
class _Streamed(Piece):
    """A piece whose data are read when they are written."""

    reader: ForeignReader
    progress: Progress

    def read(self) -> Tensor:
        """The data."""
        out = tensor_for(TensorSpec(self.shape, self.dtype))
        self.reader.read_into(self.kind, self.name, self.box, out)
        self.progress(out.nbytes)
        return out


def bring_in(
    path: Path, folder: Path, form: str, *, allow_pickle: bool = False, progress: Progress = lambda count: None
) -> Path:
    """Make a checkpoint of what another library wrote.

    Args:
        path: What it wrote.
        folder: Where checkpoints lie; one is added.
        form: hf, safetensors, torch, dcp or deepspeed.
        allow_pickle: Read pickles, which can run any code: DCP's and DeepSpeed's folders hold some.
        progress: Told how many bytes have been written since the last time.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: Where it is not of that form, holds a pickle that is not allowed, or cannot be read.
    """
    reader = _open(Path(path), form, allow_pickle)
    try:
        kept = _kept(reader)
        extra = dict(kept.get("extra", {}))
        if isinstance(reader, HuggingFaceReader) and names.is_llama(reader.config):
            extra.setdefault("model", {"name": "gpt", "args": names.gpt_args(reader.config, str(path))})
        extra |= {"brought_in": {"from": str(path), "form": form}}
        pieces: list[Piece] = [
            _Streamed(
                name,
                kind,
                spec.shape,
                spec.dtype,
                whole(spec.shape),
                torch.empty(spec.shape, dtype=spec.dtype, device="meta"),
                True,
                reader,
                progress,
            )
            for (kind, name), spec in reader.index.items()
        ]
        hyper = {name: dict(values) for name, values in kept.get("hyper", reader.hyper).items()}
        step = kept.get("step", 0)
        return save(Ranks(World()), Path(folder), step, EngineState(pieces, hyper), extra=extra)
    finally:
        reader.close()


def _kept(reader: ForeignReader) -> dict[str, Any]:
    """What we had written beside the tensors, if it was us."""
    if isinstance(reader, TorchReader):
        content = reader.content
        step = content.get("step")
        found: dict[str, Any] = {"step": step} if isinstance(step, int) and 0 <= step < 10**18 else {}
        text = content.get("bigtrain")
        return found | ({"extra": from_text(text)} if isinstance(text, str) else {})
    return dict(getattr(reader, "kept", {}))


def _open(path: Path, form: str, allow_pickle: bool) -> ForeignReader:
    if form in ("dcp", "deepspeed"):
        if not allow_pickle:
            what = "the table of contents of a DCP folder is a pickle" if form == "dcp" else "ZeRO's files are pickles"
            raise CheckpointError(
                f"{what}, which can run any code",
                where=str(path),
                remedy="if you trust where it comes from, say --allow-pickle",
            )
        if form == "dcp":
            from bigtrain.doors.pickled import DcpReader

            return DcpReader(path)
        from bigtrain.doors.deepspeed import UniversalReader, universal_of

        return UniversalReader(universal_of(path), path)
    reader = open_weights(path, allow_pickle=allow_pickle)
    if reader.form != form:
        reader.close()
        raise CheckpointError(f"{path} is {reader.form}, not {form}", remedy=f"say --from {reader.form}")
    return reader
