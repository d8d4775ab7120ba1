"""The trackers of a run, as its run file asks for them. Only rank 0 makes any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain.config.schema import Config
from bigtrain.errors import SetupError
from bigtrain.named import load
from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.behind import Behind, Buffered
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.outside import Outside, Spec
from bigtrain.tracking.repro import command
from bigtrain.tracking.wandb_files import how_to_send

_WANDB = "bigtrain.tracking.weights_and_biases:WeightsAndBiases"
_TENSORBOARD = "bigtrain.tracking.tensorboard:TensorBoard"


def make_trackers(
    config: Config,
    folder: Path,
    log: Path,
    say: Callable[[str], None],
    *,
    engine: str,
    world_size: int,
    step: int = 0,
) -> Behind:
    """Make metrics.jsonl, and the process of those trackers that may be slow, if there are any.

    Args:
        config: The run file.
        folder: The run folder.
        log: The file that what those trackers print goes to.
        say: Tells the user.
        engine: The engine that trains.
        world_size: How many processes train.
        step: The step that this start goes on from.

    Raises:
        UserError: Where a tracker of the user's own cannot be found, or TensorBoard is not installed.
    """
    metrics = MetricsFile(folder / "metrics.jsonl", say)
    trackers: list[Buffered] = [metrics]
    specs = list(_specs(config))
    if specs:
        run = TrackedRun(
            path=str(folder.absolute()),
            name=config.run.name,
            config=config.model_dump(mode="json"),
            engine=engine,
            world_size=world_size,
            step=step,
            pid=os.getpid(),
            command=command(),
        )
        is_at_wandb = any(spec.factory == _WANDB for spec in specs)
        trackers.append(
            Outside(
                specs,
                run,
                log,
                say,
                has_all=lambda: metrics.has_every_line,
                what_is_left=lambda: how_to_send(folder) if is_at_wandb else None,
            )
        )
    return Behind(trackers)


def check_trackers(config: Config) -> None:
    """Find every tracker that the run file names, before anything of the run is there.

    Raises:
        UserError: Where one cannot be found, or is a class without the two methods.
    """
    for tracker in config.track.trackers:
        factory = load(tracker.name, error=SetupError, where="track.trackers")
        lacking = [method for method in ("log", "close") if not hasattr(factory, method)]
        if isinstance(factory, type) and lacking:
            raise SetupError(
                f"the tracker {tracker.name} has no {' and no '.join(lacking)}",
                where="track.trackers",
                remedy="give it log(row), which takes a mapping, and close()",
            )
    if config.track.tensorboard:
        _check_tensorboard()


def _specs(config: Config) -> list[Spec]:
    track = config.track
    found: list[Spec] = []
    # WANDB_MODE is the user's word, too; the run file's comes before it.
    mode = os.environ.get("WANDB_MODE", "auto") if track.wandb.mode == "auto" else track.wandb.mode
    if mode != "disabled":
        args: dict[str, Any] = track.wandb.model_dump(mode="json")
        found.append(Spec("W&B", _WANDB, args))
    if track.tensorboard:
        found.append(Spec("TensorBoard", _TENSORBOARD))
    return found + [Spec(tracker.name, tracker.name, tracker.args) for tracker in track.trackers]


def _check_tensorboard() -> None:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        remedy = 'pip install "bigtrain[tensorboard]"'
        raise SetupError("TensorBoard is not installed", where="track.tensorboard", remedy=remedy)
