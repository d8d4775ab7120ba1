"""Weights & Biases: one run there for one run folder, over restarts and changes of engine, without a hole or a double.

The id is made once and lies in the run folder before wandb hears of it. Steps go on an axis of their own, because
wandb drops what comes with a smaller `step=`. What wandb has already (on its server, or in its files here) is not sent
again; what it lacks of earlier starts is taken from metrics.jsonl. Steps that a spike undid stay as they were sent, and
are not sent twice: that the run went back is marked. This runs in the trackers' process, and only there: wandb may hang
or fail as it likes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.runs import write_atomically
from bigtrain.tracking import wandb_files
from bigtrain.tracking.base import TrackedRun, flat, kind_of
from bigtrain.tracking.reading import read_events, read_rows

_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Every row of training has the first, every evaluation the second too: their last values say what has been sent.
STEP, EVAL_STEP = "train/step", "eval/step"


def make_id(path: Path) -> str:
    """The id of a run folder's run at W&B: made once, and on the disk before it is used."""
    file = path / "wandb_id"
    try:
        known = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        known = ""
    return known or new_id(path)


def new_id(path: Path) -> str:
    """Another id for a run folder."""
    made = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
    write_atomically(path / "wandb_id", made + "\n")
    return made


def _tags_of_starts(folder: Path) -> list[str]:
    """The tags for earlier starts: wandb replaces a run's tags by those of its last start."""
    found: list[str] = []
    for row in read_events(folder):
        if row["event"] == "start" and "world_size" in row:
            found += [str(row.get("engine")), f"world-{row['world_size']}", str(row.get("precision"))]
    return found


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _forget() -> None:
    """End wandb's own process, in which a run that could not begin is still in use."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


class WeightsAndBiases:
    """Sends rows to W&B.

    Args:
        run: The run.
        say: Tells the user.
        mode: online, offline, or auto: online where a login exists.
        project: W&B's project.
        entity: The user or team; None is the login's own.
        group: W&B's group.
        tags: Tags, beside those for the engine, the number of processes and the precision.
        upload_checkpoints: Whether checkpoints are uploaded; otherwise W&B is told where they lie.
        patience_s: How long its server may take to begin a run, and to end one.
    """

    def __init__(
        self,
        run: TrackedRun,
        say: Callable[[str], None],
        mode: str = "auto",
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] | list[str] = (),
        upload_checkpoints: bool = False,
        patience_s: float = 12.0,
    ) -> None:
        self._patience_s = patience_s
        self._about, self._say, self._uploads = run, say, upload_checkpoints
        self._folder = Path(run.path)
        self._named = {
            "project": project or os.environ.get("WANDB_PROJECT") or "bigtrain",
            "entity": entity,
            "group": group,
        }
        precision = run.config.get("precision", "fp32")
        self._tags = [*tags, *_tags_of_starts(self._folder), run.engine, f"world-{run.world_size}", str(precision)]
        self._rollbacks = sum(row["event"] == "rollback" for row in read_events(self._folder))
        self._has_complained = False
        self._is_online = wandb_files.is_online(mode)
        self._run = self._start()
        self._sent = self._already_sent()
        self._catch_up()

    def _start(self) -> Any:
        """Begin or go on; offline where the server cannot be had, under a new id where the old one was deleted."""
        run_id = make_id(self._folder)
        if not self._is_online:
            return self._init(run_id, "offline")
        try:
            return self._init(run_id, "online")
        except Exception as error:
            said = _said(error)
            _forget()
            if "deleted" in said:
                fresh = new_id(self._folder)
                self._say(f"W&B: the run {run_id} was deleted there; it is made anew as {fresh}")
                return self._init(fresh, "online")
            self._say(f"warning: W&B cannot be reached ({said}); its files are kept here, and can be sent later")
            self._is_online = False
            return self._init(run_id, "offline")

    def _init(self, run_id: str, mode: str) -> Any:
        import wandb

        about = self._about
        run = wandb.init(
            **self._named,  # type: ignore[arg-type]
            id=run_id,
            name=about.name,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=about.path,
            config=dict(wandb_files.flat_config(about.config))
            | {"engine": about.engine, "world_size": about.world_size},
            tags=list(dict.fromkeys(self._tags)),
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self._patience_s,
                finish_timeout=self._patience_s,
                finish_timeout_raises=True,
                program=about.command,
                # wandb shows the processor and memory of the process that trains, not of this one.
                x_stats_pid=about.pid or os.getpid(),
            ),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        if mode == "online" and run.url:
            self._say(f"W&B: {run.url}")
        return run

    def _already_sent(self) -> tuple[int, int]:
        """The last step of training and of evaluation that W&B has."""
        if self._is_online:
            summary = self._run.summary
            return int(summary.get(STEP) or 0), int(summary.get(EVAL_STEP) or 0)
        own = Path(self._run.dir).parent
        earlier = [path for path in wandb_files.logs(self._folder, self._run.id) if path.parent != own]
        try:
            return wandb_files.last_values(earlier, STEP, EVAL_STEP)
        except Exception as error:  # files of a wandb that writes them otherwise
            self._say(f"warning: W&B's earlier files cannot be read ({error}); its curves go on from here")
            return self._about.step, self._about.step

    def _catch_up(self) -> None:
        """Send what earlier starts logged and W&B has not."""
        if self._about.step == 0:
            return
        for row in read_rows(self._folder):
            if row["step"] <= self._about.step:
                self._send(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row, unless W&B has it from before a restart."""
        kind = kind_of(row)
        if kind == "event":
            self._event(row)
        elif kind == "histograms":
            self._histograms(row)
        else:
            self._send(row)

    def _send(self, row: Mapping[str, Any]) -> None:
        step, is_eval = row["step"], kind_of(row) == "eval"
        if step <= self._sent[is_eval]:
            return
        self._sent = (self._sent[0], step) if is_eval else (step, self._sent[1])
        place = {STEP: step, "train/epoch": row.get("epoch", 0), **({EVAL_STEP: step} if is_eval else {})}
        self._run.log({**flat(row), **place})

    def _histograms(self, row: Mapping[str, Any]) -> None:
        import wandb

        if row["step"] < self._sent[0]:
            return
        found = {
            f"weights/{name}": wandb.Histogram(np_histogram=(held["counts"], held["edges"]))
            for name, held in row["histograms"].items()
        }
        self._run.log({**found, STEP: row["step"]})

    def _event(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "rollback":  # what W&B has of the steps that are undone cannot be taken back: it is marked
            self._rollbacks += 1
            self._run.log({"train/rollbacks": self._rollbacks, STEP: self._sent[0]})
            self._run.tags = (*(self._run.tags or ()), "rolled-back")
        if row["event"] == "checkpoint" and row.get("path"):
            self._checkpoint(row["step"], Path(row["path"]).absolute())

    def _checkpoint(self, step: int, path: Path) -> None:
        """Tell W&B of a checkpoint. Unlike for rows, wandb waits for its server here; curves go on where that fails."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint", metadata={"step": step})
        try:
            if self._uploads:
                artifact.add_dir(str(path))
            else:
                artifact.add_reference(path.as_uri(), name=path.name, checksum=False)
            self._run.log_artifact(artifact, aliases=[f"step-{step}"])
        except Exception as error:
            # Where it is gone, it was removed since (checkpoint.keep): this process comes after the training.
            if path.exists() and not self._has_complained:
                self._has_complained = True
                self._say(f"warning: W&B did not take a checkpoint ({_said(error)}); its curves go on")

    def close(self) -> None:
        """Send what is left, and say how to send what could not be."""
        try:
            self._run.finish()
        except Exception as error:
            self._say(f"warning: W&B did not take everything ({_said(error)})")
            self._is_online = False
        if self._is_online:
            wandb_files.mark_sent(self._folder, self._run.id)
        elif told := wandb_files.how_to_send(self._folder):
            self._say(told)
