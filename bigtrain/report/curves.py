"""Which curves a report shows, out of the metrics there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bigtrain.metrics import is_score
from bigtrain.report.charts import Chart, Line, Mark
from bigtrain.report.words import num_bytes, number, seconds
from bigtrain.tracking.reading import Metrics, RunRecord, Series

_STEP_PARTS = (
    ("compute_s", "compute", 1),
    ("data_wait_s", "waiting for data", 2),
    ("save_s", "waiting for saves", 3),
    ("communication_s", "communication alone, of compute", 4),
)
# Shown in charts of their own, or not at all.
_KNOWN = {"loss", "epoch", "time", "samples", "grad_norm", "samples_per_s", "tokens_per_s", "mfu", "step_s"}
_NOT_DRAWN = {"peak_memory_rank", "longest_data_wait_s", "longest_data_wait_rank"}


def charts_of(run: RunRecord) -> list[Chart]:
    """The charts of one run, in the order of the page."""
    metrics, marks = run.metrics, marks_of(run)
    charts = [
        _loss(metrics, marks),
        *_evaluations(metrics, marks),
        _rates(metrics, marks),
        _single(metrics, marks, "grad_norm", "gradient norm", may_be_log=True, note="before clipping"),
        _single(metrics, marks, "tokens_per_s", "tokens per second", from_zero=True),
        _single(metrics, marks, "samples_per_s", "samples per second", from_zero=True),
        _single(metrics, marks, "mfu", "share of the GPUs' peak", show=_percent, from_zero=True),
        _single(metrics, marks, "peak_memory_bytes", "peak memory", show=num_bytes, from_zero=True, note=_who(metrics)),
        _time_of_a_step(metrics, marks),
        *_others(metrics, marks),
    ]
    return [replace(chart, until=float(max(run.step, 1))) for chart in charts if chart is not None]


def marks_of(run: RunRecord) -> list[Mark]:
    """Restarts and phases, as marks on the curves."""
    marks = []
    for event in run.events:
        if event["event"] == "start" and event["step"] > 0:
            marks.append(Mark(event["step"], "start", f"went on from step {event['step']:,}"))
        elif event["event"] == "phase":
            marks.append(Mark(event["step"], "phase", str(event.get("text", "a new phase"))))
    return marks


def _line(name: str, series: Series, color: int = 1, *, is_noisy: bool = True, has_dots: bool = False) -> Line:
    return Line(name, series.steps.astype(np.float64), series.values, color, is_noisy, has_dots)


def _loss(metrics: Metrics, marks: list[Mark]) -> Chart | None:
    lines = []
    if "train/loss" in metrics:
        lines.append(_line("training", metrics["train/loss"]))
    if "eval/loss" in metrics:
        lines.append(_line("evaluation", metrics["eval/loss"], 2, is_noisy=False, has_dots=True))
    return Chart("loss", lines, marks, may_be_log=True) if lines else None


def _evaluations(metrics: Metrics, marks: list[Mark]) -> Iterator[Chart]:
    for name in metrics:
        if is_score(name) and name != "eval/loss":
            title = name.removeprefix("eval/").replace("_", " ")
            line = _line(title, metrics[name], 2, is_noisy=False, has_dots=True)
            yield Chart(title, [line], marks, note="on the evaluation data")


def _rates(metrics: Metrics, marks: list[Mark]) -> Chart | None:
    names = [name for name in metrics if name == "train/lr" or name.startswith("train/lr/")]
    lines = [
        _line(
            "learning rate" if name == "train/lr" else f"group {name.rpartition('/')[2]}",
            metrics[name],
            1 + place % 6,
            is_noisy=False,
        )
        for place, name in enumerate(names)
    ]
    return Chart("learning rate", lines, marks, from_zero=True) if lines else None


def _single(
    metrics: Metrics,
    marks: list[Mark],
    name: str,
    title: str,
    *,
    show: Callable[[float], str] = number,
    may_be_log: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> Chart | None:
    if f"train/{name}" not in metrics:
        return None
    lines = [_line(title, metrics[name])]
    return Chart(title, lines, marks, show, may_be_log=may_be_log, from_zero=from_zero, note=note)


def _time_of_a_step(metrics: Metrics, marks: list[Mark]) -> Chart | None:
    lines = [_line(words, metrics[name], color) for name, words, color in _STEP_PARTS if f"train/{name}" in metrics]
    return Chart("time of a step", lines, marks, seconds, from_zero=True) if lines else None


def _others(metrics: Metrics, marks: list[Mark]) -> Iterator[Chart]:
    """What a user's own code logged."""
    shown = _KNOWN | _NOT_DRAWN | {"peak_memory_bytes"} | {part for part, _, _ in _STEP_PARTS}
    for name in metrics:
        short = name.removeprefix("train/")
        if not name.startswith("eval/") and short not in shown and not short.startswith("lr"):
            yield Chart(short, [_line(short, metrics[name])], marks)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _who(metrics: Metrics) -> str:
    if "train/peak_memory_rank" not in metrics:
        return ""
    return f"the largest of all ranks, at the end rank {int(metrics['peak_memory_rank'].values[-1])}"
