"""Whether a run may start where the run file says, which everybody who starts one asks before anything is built.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from bigtrain import runs
from bigtrain.config.loader import load
from bigtrain.config.schema import Config
from bigtrain.errors import ConfigError


def allowed_for(config: Config) -> runs.Allowed:
    """What may lie in the run's folder already: a run that goes on, if the run file lets it."""
    goes_on = config.checkpoint.resume == "auto"
    return runs.Allowed(unfinished=goes_on, finished=goes_on and _asks_for_more(config))


def word_of_early_stop(path: Path | None, *, goes_on: bool, took_steps: bool = False) -> str:
    """What there is of a run that was stopped and could not save, and what to do.

    Args:
        path: Its folder; None where it is not known yet.
        goes_on: Whether the run file lets a run that has begun go on.
        took_steps: Whether it may have taken steps, which are lost.
    """
    if took_steps and path and (path / runs.RESULT).exists():
        return f"ended at once; the run is finished: {path}"
    step = runs.newest_step(path) if path else -1
    if step >= 0:
        way = "the same command" if goes_on else "with checkpoint.resume=auto it"
        stopped = "ended at once, saving nothing more" if took_steps else "stopped before another step"
        return f"{stopped}; {way} goes on from step {step}"
    has_begun = path is not None and (path / runs.CONFIG).exists()
    way = "the same command begins it" if goes_on or not has_begun else f"delete {path}, and the same command begins it"
    stopped = "ended at once" if took_steps else "stopped before its first step"
    return f"{stopped}: nothing was saved; {way}"


def _asks_for_more(config: Config) -> bool:
    """Whether the run file now asks for a longer training than the one in the folder was."""
    path = Path(config.run.dir, config.run.name, runs.CONFIG)
    try:
        kept = load(path).config
    except ConfigError:  # there is none, or one of a version with other keys
        return False
    stopped_early = runs.read_json(path.with_name(runs.RESULT)).get("stopped_early")
    if stopped_early and config.eval.early_stop != kept.eval.early_stop:
        return True
    before, now = kept.train, config.train
    return (before.steps is not None and (now.steps or 0) > before.steps) or (
        before.epochs is not None and (now.epochs or 0) > before.epochs
    )
