"""TensorBoard's files, written by its own writer; torch is not needed for that."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import SetupError
from bigtrain.tracking.base import TrackedRun, flat, kind_of
from bigtrain.tracking.reading import read_rows


class TensorBoard:
    """Writes rows to <run folder>/tensorboard, under the names that W&B shows.

    Args:
        run: The run. Of steps that are taken again, after a restart or a spike, TensorBoard leaves out the first. What
            it lacks of earlier starts, as its process was killed or it was not asked for, comes from metrics.jsonl.
    """

    def __init__(self, run: TrackedRun) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise SetupError(
                "TensorBoard is not installed", where="track.tensorboard", remedy='pip install "bigtrain[tensorboard]"'
            ) from None
        self._events, self._summaries = event_pb2, summary_pb2
        folder = Path(run.path)
        held = _last_steps(folder / "tensorboard") if run.step else {}
        self._writer = EventFileWriter(str(folder / "tensorboard"), flush_secs=10)
        if run.step:
            self._go_on_from(run.step)
            for row in read_rows(folder):
                if held.get(kind_of(row), 0) < row["step"] <= run.step:
                    self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        kind = kind_of(row)
        if kind == "event":
            if row["event"] == "rollback":
                self._go_on_from(row["step"])
            return
        if kind == "histograms":
            values = [self._histogram(f"weights/{name}", held) for name, held in row["histograms"].items()]
        else:
            make = self._summaries.Summary.Value
            values = [make(tag=name, simple_value=value) for name, value in flat(row).items()]
        when = row.get("time") or time.time()
        self._write(row["step"], when, summary=self._summaries.Summary(value=values))

    def _go_on_from(self, step: int) -> None:
        """Let TensorBoard leave out what it has of later steps, which are taken again."""
        self._write(step + 1, time.time(), session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def _write(self, step: int, when: float, **what: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=when, step=step, **what))

    def _histogram(self, name: str, held: Mapping[str, Any]) -> Any:
        edges, counts = held["edges"], held["counts"]
        proto = self._summaries.HistogramProto(
            min=held["min"],
            max=held["max"],
            num=sum(counts),
            sum=held["sum"],
            sum_squares=held["sum_squares"],
            bucket_limit=edges[1:],
            bucket=counts,
        )
        return self._summaries.Summary.Value(tag=name, histo=proto)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _last_steps(folder: Path) -> dict[str, int]:
    """The last steps of training and of evaluation in TensorBoard's files, each in the newest that has any."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        found = dict(_kinds_and_steps(path)) | found
        if len(found) == 2:
            break
    return found


def _kinds_and_steps(path: Path) -> Iterator[tuple[str, int]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for event in LegacyEventFileLoader(str(path)).Load():
        for kind in {value.tag.partition("/")[0] for value in event.summary.value} & {"train", "eval"}:
            yield kind, event.step
