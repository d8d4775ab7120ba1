"""DeepSpeed's universal checkpoints: a folder for every parameter, which its loading cuts up for any stage and size.

    latest_universal                          names the folder of the step
    global_step10/mp_rank_00_model_states.pt  buffers, step and what DeepSpeed asks for; again as zero_pp_rank_0_…
    global_step10/zero/optimizer_state.pt     hyperparameters
    global_step10/zero/<name>/fp32.pt         {"param": tensor}; exp_avg.pt and so on likewise

It is DeepSpeed's documented way between stages and numbers of ranks (its `ds_to_universal`), and it streams. A folder
that is not universal yet is made so by DeepSpeed's own converter, beside it, for the time of reading.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.doors.kept import KEY, as_text, from_text
from bigtrain.errors import CheckpointError, CorruptError, SetupError
from bigtrain.state import BUFFER, EMA, WEIGHT, Box, TensorSpec

Key = tuple[str, str]

_LATEST, _LATEST_UNIVERSAL = "latest", "latest_universal"
_MODEL, _OPTIMIZER, _WEIGHT_FILE = "mp_rank_00_model_states.pt", "optimizer_state.pt", "fp32.pt"
_MODEL_OF_STAGE_3 = f"zero_pp_rank_0_{_MODEL}"  # the same under the name that it looks for in stage 3
_LONGEST_NAME = 255  # bytes, on every common file system


def write(path: Path, reader: Any) -> None:
    """Write a folder that DeepSpeed loads with `checkpoint: {load_universal: true}`.

    Args:
        path: The folder.
        reader: What has `index`, `hyper`, `extra`, `step`, and `whole(key)`, a tensor by kind and name.

    Raises:
        CheckpointError: Where a name cannot be that of a folder.
    """
    _check_names(reader)
    library = _library()
    tag = f"global_step{reader.step}"
    zero = path / tag / "zero"
    zero.mkdir(parents=True)
    for kind, name in reader.index:
        if kind in (BUFFER, EMA):  # it loads whatever file lies there as a slot of its optimizer
            continue
        tensor = reader.whole((kind, name))
        # Its loading takes the step from the step file, and casts nothing.
        folder = zero / name
        folder.mkdir(exist_ok=True)
        if kind == "step":
            torch.save(tensor, folder / "step.pt")
        else:
            torch.save({"param": tensor}, folder / (_WEIGHT_FILE if kind == WEIGHT else f"{kind}.pt"))
    (path / _LATEST_UNIVERSAL).write_text(tag)
    torch.save(_model_state(reader, library.__version__), path / tag / _MODEL)
    shutil.copy(path / tag / _MODEL, path / tag / _MODEL_OF_STAGE_3)
    torch.save(_optimizer_state(reader, library.__version__), zero / _OPTIMIZER)


def _check_names(reader: Any) -> None:
    """See that no name leads out of the folder: whoever made the checkpoint may have chosen it for that."""
    wrong = [
        name
        for key in reader.index
        for name in key
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(f"{name}.pt".encode()) > _LONGEST_NAME
    ]
    if wrong:
        raise CheckpointError(
            f"DeepSpeed has a folder for every parameter, and none can be called {wrong[0][:200]!r}",
            where=str(reader.path),
            remedy="export it --to dcp or --to torch",
        )


def _model_state(reader: Any, version: str) -> dict[str, Any]:
    shapes = {name: torch.Size(spec.shape) for (kind, name), spec in reader.index.items() if kind == WEIGHT}
    buffers = {name: reader.whole((kind, name)) for kind, name in reader.index if kind == BUFFER}
    held = [list(key) for key in reader.index if key[0] not in (BUFFER, EMA)]
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": reader.step,
        "global_samples": reader.extra.get("samples", 0),
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version,
        "lr_scheduler": None,
        "optimizer": None,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
        KEY: as_text({"step": reader.step, "hyper": reader.hyper, "extra": reader.extra, "held": held}),
    }


def _optimizer_state(reader: Any, version: str) -> dict[str, Any]:
    """Hyperparameters by group, in the order of the parameters; stages 1 and 2 look elsewhere than stage 3."""
    groups: list[dict[str, Any]] = []
    for values in reader.hyper.values():
        if values not in groups:
            groups.append(dict(values))
    steps = [key for key in reader.index if key[0] == "step"]
    state = {"step": reader.whole(steps[0])} if steps else {}
    param_groups = [{**group, "params": [number]} for number, group in enumerate(groups)]
    return {
        "param_groups": param_groups,
        "optimizer_state_dict": {"state": {0: state}, "param_groups": param_groups},
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 0.0,
        "ds_version": version,
    }


class UniversalReader:
    """A universal checkpoint.

    Args:
        folder: The folder of the step, in its universal form.
        path: What the user named.

    Raises:
        CorruptError: Where a file cannot be read.
    """

    form = "deepspeed"

    def __init__(self, folder: Path, path: Path) -> None:
        self.path, self._folder = path, folder
        state = _load(folder / _MODEL, trusted=True)
        self.kept: dict[str, Any] = from_text(state.get(KEY, "{}"))
        self.kept.setdefault("step", int(state.get("global_steps", 0)))
        buffers = set(state.get("buffer_names") or ())
        self._tensors: dict[Key, Tensor] = {
            (BUFFER, name): tensor for name, tensor in (state.get("module") or {}).items() if name in buffers
        }
        index = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self._tensors.items()}
        self._files: dict[Key, Path] = {}
        for folder_of in sorted(entry for entry in (folder / "zero").iterdir() if entry.is_dir()):
            for file in sorted(folder_of.glob("*.pt")):
                kind = WEIGHT if file.name == _WEIGHT_FILE else file.stem
                tensor = _tensor(file)
                self._files[kind, folder_of.name] = file
                index[kind, folder_of.name] = TensorSpec(tuple(tensor.shape), tensor.dtype)
        self._check_whole(state.get("param_shapes") or ())
        self.index: Mapping[Key, TensorSpec] = index
        self.hyper: Mapping[str, Mapping[str, Any]] = self.kept.get("hyper", {})

    def _check_whole(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """See that every file is there; of the moments only an export of ours tells which there were."""
        held = {(WEIGHT, name) for group in shapes for name in group}
        held |= {(kind, name) for kind, name in self.kept.pop("held", ())}
        missing = sorted(held - self._files.keys())
        if missing:
            kind, name = missing[0]
            file = self._folder / "zero" / name / (_WEIGHT_FILE if kind == WEIGHT else f"{kind}.pt")
            more = f", nor are {len(missing) - 1} more" if missing[1:] else ""
            raise CorruptError(f"{file} is not there{more}", where=str(self.path))

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` with that part of the tensor."""
        key = (kind, name)
        if key not in self.index:
            raise CheckpointError(f"{self.path} has no {kind} {name}", where=str(self.path))
        tensor = self._tensors[key] if key in self._tensors else _tensor(self._files[key])
        with torch.no_grad():
            out.copy_(tensor[box.slices])

    def close(self) -> None:
        """Remove what was made for reading only."""
        if not self._folder.is_relative_to(self.path):
            shutil.rmtree(self._folder.parent, ignore_errors=True)


def universal_of(path: Path) -> Path:
    """The folder of the newest step of what DeepSpeed saved, in its universal form.

    Raises:
        CheckpointError: Where DeepSpeed saved nothing there.
    """
    if (path / _LATEST_UNIVERSAL).is_file():
        return path / (path / _LATEST_UNIVERSAL).read_text().strip()
    if (path / "zero").is_dir() and (path / _MODEL).is_file():
        return path
    source = path / (path / _LATEST).read_text().strip() if (path / _LATEST).is_file() else path
    if not list(source.glob("*_optim_states.pt")):
        raise CheckpointError(f"{path} is no checkpoint of DeepSpeed's ZeRO", where=str(path))
    _library()
    from deepspeed.checkpoint import ds_to_universal

    made = Path(tempfile.mkdtemp(prefix="universal-", dir=path.parent))
    options = Namespace(
        input_folder=str(source),
        output_folder=str(made / "universal"),  # beside it the converter leaves a pointer
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except Exception as error:
        shutil.rmtree(made, ignore_errors=True)
        raise CorruptError(
            f"DeepSpeed cannot make a universal checkpoint of {path}: {error}", where=str(path)
        ) from error
    return made / "universal"


def _tensor(file: Path) -> Tensor:
    value = _load(file)
    tensor = value.get("param") if isinstance(value, Mapping) else value
    if isinstance(tensor, int | float):
        tensor = torch.tensor(float(tensor))
    if not isinstance(tensor, Tensor):
        raise CorruptError(f"{file} holds no tensor", where=str(file))
    return tensor


def _load(file: Path, *, trusted: bool = False) -> Any:
    if trusted:
        from bigtrain.doors import pickled

        return pickled.load(file)
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CorruptError(f"{file} cannot be read: {error}", where=str(file)) from error


def _library() -> Any:
    import os

    try:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            import deepspeed
    except ImportError as error:
        remedy = 'pip install "bigtrain[deepspeed]"'
        raise SetupError("DeepSpeed is not installed", where="deepspeed", remedy=remedy) from error
    return deepspeed
