"""What a report says of a run beside its curves: state, tiles, what ran, what happened, warnings."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigtrain import lease
from bigtrain.config.keys import all_keys, show
from bigtrain.failures import read_errors
from bigtrain.metrics import is_better_when_small, is_score
from bigtrain.report.words import count, escape, moment, num_bytes, number, seconds
from bigtrain.runs import read_json
from bigtrain.tracking.reading import RunRecord, Series

# A run without a lease (its folder is a copy, say) that has written nothing for so long is not running.
_LIVE_SECONDS = 120.0


@dataclass(frozen=True)
class State:
    """How a run stands.

    Attributes:
        word: finished, failed, running, stopped or broken off.
        error: What it failed of.
    """

    word: str
    error: str = ""


def state_of(run: RunRecord) -> State:
    """Whether a run has finished, failed, was stopped or broken off, or goes on."""
    if run.is_finished:
        return State("finished")
    if run.events and run.events[-1]["event"] == "stop":
        return State("stopped")
    attempts = sorted((run.path / "attempts").glob("*"), key=lambda path: (len(path.name), path.name))
    failures = read_errors(attempts[-1]) if attempts else []
    if failures:
        first = failures[0]
        step = "before the first step" if first.step is None else f"after step {first.step}"
        place = f"\n  at: {first.where}" if first.where else ""
        remedy = f"\n  do: {first.remedy}" if first.remedy else ""
        return State("failed", f"rank {first.rank}, {step}: {first.type}: {first.message}{place}{remedy}")
    if run.events and run.events[-1]["event"] == "failure":
        return State("failed", f"after step {run.events[-1]['step']}: {run.events[-1].get('text', '')}")
    return State("running" if _is_live(run.path) else "broken off")


def _is_live(folder: Path) -> bool:
    if lease.read(folder) is not None:
        return lease.live_holder(folder) is not None
    return time.time() - _written_at(folder / "metrics.jsonl") < _LIVE_SECONDS


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def headline(run: RunRecord) -> str:
    """One line on what ran."""
    get = run.settings.get
    world = int(run.result.get("world_size") or _last_start(run).get("world_size") or 1)
    engine = run.result.get("engine") or _last_start(run).get("engine") or get("engine.name")
    parts = [
        f"{get('model.name', 'a model')} on {get('data.name', 'data')}",
        f"{engine}, {count(world, 'process') if world == 1 else f'{world} processes'}",
        f"{get('precision', 'fp32')}",
    ]
    if run.rows:
        parts.append(f"{run.step:,} step{'s' if run.step != 1 else ''}")
        if began := run.rows[0].get("time"):
            parts.append(moment(began))
    return " · ".join(escape(part) for part in parts)


def _last_start(run: RunRecord) -> Mapping[str, Any]:
    return next((event for event in reversed(run.events) if event["event"] == "start"), {})


def tiles(run: RunRecord) -> str:
    """The numbers that are asked for first."""
    metrics = run.metrics
    shown: list[tuple[str, str, str]] = []
    if "train/loss" in metrics:
        shown.append(("training loss", number(float(metrics["loss"].values[-1])), f"at step {run.step:,}"))
    for name in [name for name in metrics if is_score(name)][:3]:
        title = name.removeprefix("eval/").replace("_", " ")
        title = "eval loss" if title == "loss" else title
        shown.append((title, number(float(metrics[name].values[-1])), _best(name, metrics[name])))
    for name, title in (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s")):
        if f"train/{name}" in metrics:
            values = metrics[name].values
            finite = sorted(values[_finite(values)].tolist())
            if finite:
                shown.append((title, number(round(finite[len(finite) // 2])), "median"))
            break
    if "train/peak_memory_bytes" in metrics:
        shown.append(("peak memory", num_bytes(float(metrics["peak_memory_bytes"].values.max())), "of one process"))
    if duration := trained_for(run):
        restarts = sum(event["event"] == "start" for event in run.events) - 1
        shown.append(("training time", seconds(duration), count(restarts, "restart") if restarts > 0 else "one start"))
    kept = run.result.get("best")
    if kept and kept.get("value") is not None:
        shown.append((f"best {kept['metric']}", number(float(kept["value"])), f"kept, of step {int(kept['step']):,}"))
    if run.checkpoints:
        last = run.checkpoints[-1]
        shown.append(("checkpoint", f"step {last.step:,}", num_bytes(last.num_bytes)))
    return "".join(
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for title, value, note in shown
    )


def _best(name: str, series: Series) -> str:
    """The best value that is a number, and its step; nothing where none is."""
    is_number = _finite(series.values)
    steps, values = series.steps[is_number], series.values[is_number]
    if not len(values):
        return ""
    best = int(values.argmin() if is_better_when_small(name) else values.argmax())
    return f"best {number(float(values[best]))} at step {steps[best]:,}"


def trained_for(run: RunRecord) -> float:
    """Seconds of training: from row to row, without what lies between two starts."""
    starts = {int(event["step"]) for event in run.events if event["event"] == "start"}
    total, step, earlier = 0.0, 0, None
    for row in run.rows:
        now = row.get("time")
        if now is None:
            continue
        is_new_start = earlier is None or any(step <= start < row["step"] for start in starts)
        total += row.get("step_s", 0.0) * (row["step"] - step) if is_new_start else max(now - (earlier or now), 0.0)
        step, earlier = row["step"], now
    return total


def config_table(run: RunRecord) -> str:
    """The values of the run file that are not the defaults, then the whole file."""
    defaults = {key.path: key.default for key in all_keys()}
    rows = "".join(
        f'<tr><td class="name">{escape(key)}</td><td><code>{escape(show(value, 200))}</code></td></tr>'
        for key, value in run.settings.items()
        if defaults.get(key) is None or show(value) != defaults[key]
        if not (value is None or value in ({}, []))
    )
    whole = yaml.safe_dump(dict(run.values), sort_keys=False, allow_unicode=True, width=100)
    return (
        f"<table>{rows}</table><details><summary>the whole run file, as it was resolved</summary>"
        f"<pre>{escape(whole)}</pre></details>"
    )


def machine_table(run: RunRecord) -> str:
    """The code, the packages and the machine, where the run folder tells them."""
    folder = run.path / "repro"
    first = read_json(folder / "machine.json")
    rows = [(key, value) for key, value in first.items() if value not in (None, "", [])]
    extra = [
        _unfolded("changes that were not committed", _text(folder / "diff.patch")),
        _unfolded("packages", _text(folder / "packages.txt")),
    ]
    later = [(int(path.name[8:]), path) for path in folder.glob("attempt-*") if path.name[8:].isdecimal()]
    for attempt, place in sorted(later):  # what is otherwise than in the first start
        start = f"start {attempt}"
        machine = read_json(place / "machine.json")
        rows += [(f"{start}: {key}", value) for key, value in machine.items() if value != first.get(key)]
        extra.append(_unfolded(f"{start}: changes that were not committed", _text(place / "diff.patch")))
        packages = set(_text(folder / "packages.txt").splitlines())
        others = [line for line in _text(place / "packages.txt").splitlines() if line not in packages]
        extra.append(_unfolded(f"{start}: packages that were others", "\n".join(others)))
    table = "".join(
        f'<tr><td class="name">{escape(key.replace("_", " "))}</td><td>{escape(_words(value))}</td></tr>'
        for key, value in rows
    )
    return f"<table>{table}</table>{''.join(extra)}" if table or any(extra) else ""


def _unfolded(title: str, text: str) -> str:
    """A long text under a title that opens it; nothing where there is none."""
    if not text.strip():
        return ""
    cut = text if len(text) < 100_000 else text[:100_000] + "\n…"
    return f"<details><summary>{title}</summary><pre>{escape(cut)}</pre></details>"


def _words(value: Any) -> str:
    if isinstance(value, list):
        counted = [(item, len(list(group))) for item, group in itertools.groupby(map(str, value))]
        return ", ".join(f"{number} × {item}" if number > 1 else item for item, number in counted)
    return str(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def events_table(run: RunRecord) -> str:
    """What happened, in order; checkpoints that follow one another in one line."""
    lines = []
    for kind, group in itertools.groupby(run.events, key=lambda event: event["event"]):
        together = list(group)
        if kind == "checkpoint" and len(together) > 3:
            lines.append((together[-1], _checkpoints(together)))
        else:
            lines += [(event, _happened(event)) for event in together]
    rows = "".join(
        f"<tr><td>{moment(event['time']) if 'time' in event else ''}</td><td>step {event['step']:,}</td>"
        f'<td class="{"warning" if event["event"] in _BAD_EVENTS else ""}">{escape(words)}</td></tr>'
        for event, words in lines
    )
    return f'<table class="events">{rows}</table>' if rows else ""


_BAD_EVENTS = ("no checkpoint", "warning", "fallback", "spike", "rollback")


def _checkpoints(events: list[dict[str, Any]]) -> str:
    steps = ", ".join(f"{event['step']:,}" for event in (events[0], events[1]))
    size, took = float(events[-1].get("bytes", 0)), max(float(event.get("seconds", 0)) for event in events)
    best = next((f"; the best: {event['best']}" for event in reversed(events) if "best" in event), "")
    return (
        f"{count(len(events), 'checkpoint')}: {steps}, … {events[-1]['step']:,}; "
        f"{num_bytes(size)} each, written in {seconds(took)} at most{best}"
    )


def _happened(event: Mapping[str, Any]) -> str:
    kind = event["event"]
    if kind == "start":
        attempt = event.get("attempt", 0)
        world = int(event.get("world_size", 1))
        processes = "1 process" if world == 1 else f"{world} processes"
        where = f"{event['engine']}, {processes}" if "engine" in event else ""
        verb = f"start {attempt}" + (f", going on from step {event['step']:,}" if event["step"] else "")
        return f"{verb}: {where}" if where else verb
    if kind == "checkpoint":
        best = f", the best: {event['best']}" if "best" in event else ""
        size, took = num_bytes(float(event.get("bytes", 0))), seconds(float(event.get("seconds", 0)))
        return f"checkpoint, {size} in {took}{best}"
    rest = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
    text = rest.pop("text", None) or rest.pop("reason", None)
    more = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())
    return ": ".join(part for part in (kind, text, more) if part)


def warnings_of(run: RunRecord) -> Iterator[str]:
    """What a reader should know before trusting the curves."""
    yield from run.problems
    metrics = run.metrics
    for name in ("train/loss", "train/grad_norm", *(name for name in metrics if name.startswith("eval/"))):
        if name in metrics:
            bad = int((~_finite(metrics[name].values)).sum())
            if bad:
                yield f"{count(bad, 'value')} of {name.removeprefix('train/')} not finite"
    if run.result.get("stopped_early"):
        yield "the run ended early: " + next(
            (str(event.get("text")) for event in reversed(run.events) if event["event"] == "early stop"), ""
        )
    skipped = int(run.result.get("skipped_steps") or 0)
    if skipped:
        yield f"{count(skipped, 'step')} left out, because loss or gradient norm was not finite"
    for event in run.events:
        if event["event"] in _BAD_EVENTS:
            yield f"step {event['step']:,}: {_happened(event)}"


def _finite(values: Any) -> Any:
    import numpy as np

    return np.isfinite(values)
