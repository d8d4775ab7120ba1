"""A checkpoint of ours as what other libraries open with their own tools, one tensor at a time.

What is written stands under a temporary name until it is whole, so a broken-off export leaves nothing that looks like
one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import CheckpointReader
from bigtrain.doors import adapters, hugging_face
from bigtrain.doors.kept import as_text
from bigtrain.doors.streaming import Progress, Watched, write_safetensors
from bigtrain.errors import CheckpointError, SaveError, SetupError
from bigtrain.state import BUFFER, WEIGHT

FORMS = ("hf", "safetensors", "torch", "dcp", "deepspeed", "peft")

_MERGED = ("hf", "safetensors", "torch")  # an adapter is merged into the weights in these


def export(
    reader: CheckpointReader,
    out: Path,
    form: str,
    progress: Progress = lambda count: None,
    *,
    averaged: bool = False,
    base: Path | None = None,
) -> None:
    """Write a checkpoint in another form.

    Args:
        reader: The checkpoint.
        out: The file or folder to make; it must not be there.
        form: hf, safetensors, torch, dcp, deepspeed or peft. torch, dcp and deepspeed hold the optimizer's state as
            well. An adapter is merged into the weights in the first three, and the optimizer's state then left out;
            peft is the adapter alone.
        progress: Told how many bytes have been written since the last time.
        averaged: Write the moving averages of weights (optim.ema) in their place.
        base: Where the folder of a model hf/<folder> lies now, should it have moved.

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
        os.close(os.open(probe := out.with_name(f".{out.name}.{os.getpid()}"), os.O_CREAT | os.O_WRONLY))
        probe.unlink()  # torch's own writer says of a place that takes nothing only that something failed
        merges = form in _MERGED and adapters.adapter_of(reader.extra) is not None
        watched = (adapters.Merged if merges else Watched)(reader, progress, averaged=averaged)
        if base is not None:
            watched.extra = hugging_face.moved(watched.extra, base)
        _export(watched, out, form)
    except OSError as error:
        raise SaveError(
            f"cannot write {out}: {error.strerror or error}",
            where=str(out),
            remedy="give another place, with room for it; nothing was left behind",
        ) from error


def _export(reader: Watched, out: Path, form: str) -> None:
    aside = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        _WRITERS[form](reader, aside)
        os.replace(aside, out)
    except RuntimeError as error:
        raise _reason(error, out) from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _reason(error: RuntimeError, out: Path) -> BaseException:
    """Why torch's own writer failed, which says the same of everything: a full disk, a Ctrl-C."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            return cause
        cause = cause.__context__
    return SaveError(
        f"cannot write {out}: torch's writer failed, with {shutil.disk_usage(out.parent).free:,} bytes free: {error}",
        where=str(out),
        remedy="give another place, with room for it; nothing was left behind",
    )


# ---- torch and DCP ----------


def _write_torch(reader: Watched, path: Path) -> None:
    from bigtrain.doors.torch_files import write

    places = {
        key: ("model", key[1]) if key[0] in (WEIGHT, BUFFER) else ("optimizer", key[1], key[0]) for key in reader.index
    }
    content: dict[str, Any] = {
        "step": reader.step,
        "hyper": {name: dict(values) for name, values in reader.hyper.items()},
        "buffers": [name for kind, name in reader.index if kind == BUFFER],
        "bigtrain": as_text(reader.extra),
    }
    write(path, content, places, reader)


def _write_dcp(reader: Watched, path: Path) -> None:
    from bigtrain.doors.dcp import write

    write(path, reader)


def _write_deepspeed(reader: Watched, path: Path) -> None:
    try:
        from bigtrain.doors.deepspeed import write
    except ImportError as error:
        remedy = 'pip install "bigtrain[deepspeed]"'
        raise SetupError("DeepSpeed is not installed", where="--to deepspeed", remedy=remedy) from error
    write(path, reader)


_WRITERS: Mapping[str, Callable[[Watched, Path], None]] = {
    "hf": hugging_face.write,
    "safetensors": write_safetensors,
    "torch": _write_torch,
    "dcp": _write_dcp,
    "deepspeed": _write_deepspeed,
    "peft": adapters.write_peft,
}
