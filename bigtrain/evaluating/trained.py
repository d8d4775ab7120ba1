"""The plain model of a checkpoint and the run file that it was trained by, in this process.

Weights are read one tensor at a time to where the model has them: no memory is needed beside the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from bigtrain import models
from bigtrain.checkpoint import CheckpointReader, best_of, newest, open_checkpoint
from bigtrain.config.loader import from_dict
from bigtrain.config.schema import Config
from bigtrain.dist import World, choose_device
from bigtrain.doors import open_whole
from bigtrain.engines import slots
from bigtrain.engines.base import persistent_buffers
from bigtrain.engines.casting import Casting
from bigtrain.errors import CheckpointError, CombinationError
from bigtrain.finetune.adapters import build_model
from bigtrain.prepare import COMPUTE_DTYPES, DTYPES, seed_everything
from bigtrain.protocols import Batch, Task
from bigtrain.resuming import weights_of
from bigtrain.running import lack_of_memory_explained, torch_set_up
from bigtrain.runs import by_name, checkpoints_of, instead_of, is_run, run_at
from bigtrain.state import BUFFER, EMA, WEIGHT, TensorSpec, whole
from bigtrain.trainer import build_task

_GIVEN = "given:"  # how an object that no name leads to stands in a run file


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint (an `Evaluator` of the loop).

    Attributes:
        model: The plain module, on the device.
        task: What it learnt.
        config: The run file of the checkpoint, with what was laid over it.
        path: The checkpoint.
        step: How many steps it had been trained.
        kept: What else the checkpoint holds.
        world: This process alone.
    """

    model: nn.Module
    task: Task
    config: Config
    path: Path
    step: int
    kept: Mapping[str, Any]
    world: World
    casting: Casting | None = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the precision of the run."""
        copies: AbstractContextManager[None] = self.casting.copies() if self.casting else nullcontext()
        self.model.eval()
        with torch.no_grad(), copies:
            yield

    def dtype(self) -> torch.dtype:
        """What inputs are kept in."""
        return DTYPES[self.config.precision]


def find_checkpoint(place: str | Path, folder: str | Path = "runs", *, best: bool = False) -> Path:
    """The checkpoint that a path or a run's name leads to: it itself, or the newest of the run, or its best.

    Raises:
        CheckpointError: Where there is none.
    """
    path = by_name(place, folder)
    if best:
        return best_of(path)
    for candidate in (checkpoints_of(path), path):
        found = newest(candidate) if candidate.is_dir() else None
        if found:
            return found
    if checkpoints_of(path).is_dir() or is_run(path):
        raise CheckpointError(f"the run {path} has no checkpoint yet", where=str(path), remedy="let it save one")
    if not path.exists() or not ((path / "manifest.json").exists() or path.name.startswith("step-")):
        named = run_at(place, folder)
        raise CheckpointError(
            f"there is no run or checkpoint {place}",
            where=str(named.parent),
            remedy=instead_of(named, "give the folder of all runs with --dir"),
        )
    return path


@contextmanager
def opened(path: Path, overrides: Sequence[str] = (), *, averaged: bool | None = None) -> Iterator[Trained]:
    """Build the model that a checkpoint is of, and read its weights.

    Args:
        path: The checkpoint's folder.
        overrides: `key=value`, over the run file that the checkpoint holds.
        averaged: Whether to read the moving averages of weights (optim.ema); None reads what the run evaluated with.

    Raises:
        CheckpointError: Where it cannot be read, or holds no run file, or not the averages that were asked for.
        CombinationError: Where the run was given its model or task as an object.
        StateError: Listing everything in the checkpoint that does not fit the model.
    """
    with open_checkpoint(path) as bare:
        config = _config(bare, overrides)
    with open_whole(path, instead=weights_of(config)) as reader:
        world = World(device=choose_device(config.engine.device))
        with torch_set_up(config), lack_of_memory_explained(config, world, "single"):
            seed_everything(config.run.seed)
            task = build_task(config)
            model = _load(reader, config, world.device, averaged)
            dtype = COMPUTE_DTYPES.get(config.precision)
            casting = Casting(model, dtype, list(model.parameters())) if dtype else None
            yield Trained(model, task, config, path, reader.step, reader.extra, world, casting)


def load_trained(
    place: str | Path,
    *,
    folder: str | Path = "runs",
    best: bool = False,
    ema: bool | None = None,
    overrides: Sequence[str] = (),
) -> AbstractContextManager[Trained]:
    """A trained model, to be used in a `with` statement: `with bigtrain.load_trained("runs/a") as trained: …`.

    Its `model` is the plain module with the weights of the checkpoint; `evaluating()` is the mode to call it in.

    Args:
        place: A run's folder or name, whose newest checkpoint is taken, or a checkpoint.
        folder: The folder of all runs, in which names are looked for.
        best: Of a run, take the best checkpoint.
        ema: Take the moving averages of weights, or do not; None takes what the run evaluated with.
        overrides: `key=value`, over the run file that the checkpoint holds.

    Raises:
        BigtrainError: As `opened` does.
    """
    return opened(find_checkpoint(place, folder, best=best), overrides, averaged=ema)


def check_model(trained: Trained, batch: Batch) -> None:
    """Let the task look at the model and at two samples, as before a training: losses go by what it finds."""
    check = getattr(trained.task, "check", None)
    if check is not None:
        with trained.evaluating():  # bf16 casts whatever goes into the model
            check(trained.model, batch)


def refuse_given(config: Config, part: str) -> None:
    """Refuse a run file that does not say how to make its model, data or task.

    Raises:
        CombinationError: With the way out.
    """
    name = getattr(config, part).name
    if name.startswith(_GIVEN):
        raise CombinationError(
            f"the run was given its {part} as an object ({name.removeprefix(_GIVEN)}), which no name leads to",
            where=f"{part}.name",
            remedy=f"name what makes it: {part}.name=package.module:name, and its arguments as {part}.args.…",
        )


def _config(reader: CheckpointReader, overrides: Sequence[str]) -> Config:
    text = reader.extra.get("config")
    if not isinstance(text, str):
        raise CheckpointError(
            f"{reader.path} holds no run file: it was not saved by a run",
            where=str(reader.path),
            remedy="start a run from it (finetune.init_from) and evaluate that",
        )
    config = from_dict(yaml.safe_load(text), overrides).config
    refuse_given(config, "model")
    refuse_given(config, "task")
    return config


def _load(reader: CheckpointReader, config: Config, device: torch.device, averaged: bool | None) -> nn.Module:
    """The model, every weight and persistent buffer of it read from the checkpoint."""
    if averaged:
        reader.check_averages()
    elif averaged is None:
        averaged = config.optim.ema is not None and config.optim.ema.evaluate
    fillable = models.is_fillable(config.model.name, config.model.args)
    with torch.device("meta" if fillable else "cpu"):
        model = build_model(config)
    model.to(dtype=DTYPES[config.precision])
    if fillable:
        _give_memory(model, device)
    model.to(device)
    tensors: dict[tuple[str, str], Tensor] = {(WEIGHT, name): p.data for name, p in model.named_parameters()}
    tensors |= {(BUFFER, name): buffer for name, buffer in persistent_buffers(model).items()}
    slots.check(reader, {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in tensors.items()}, ())
    for (kind, name), tensor in tensors.items():
        source = EMA if averaged and (EMA, name) in reader.index else kind  # what is frozen has no average
        reader.read_into(source, name, whole(tensor.shape), tensor)
    return model


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory for a model on the meta device, not yet written to; what is shared stays shared, as `to_empty` has not."""
    made: dict[Tensor, Tensor] = {}
    empty = partial(torch.empty_like, device=device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(empty(parameter), requires_grad=False)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(buffer, empty(buffer))
    if hasattr(model, "reset_buffers"):
        model.reset_buffers()  # type: ignore[operator]
