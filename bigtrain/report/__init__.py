"""A run as one HTML file that needs no network and no script, made from its folder alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from bigtrain.report.curves import charts_of, marks_of
from bigtrain.report.facts import (
    State,
    config_table,
    events_table,
    headline,
    machine_table,
    state_of,
    tiles,
    warnings_of,
)
from bigtrain.report.results import by_class, confusion_matrix, samples
from bigtrain.report.words import escape
from bigtrain.runs import write_atomically
from bigtrain.tracking.reading import RunRecord, load_run

# No script and nothing from elsewhere, whatever a run's names and texts hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run: RunRecord | str | Path) -> Path:
    """Write report.html into a run's folder, and return its path.

    Args:
        run: A run, or its folder.

    Raises:
        RunFolderError: Where it is not the folder of a run.
    """
    record = run if isinstance(run, RunRecord) else load_run(run)
    path = record.path / "report.html"
    write_atomically(path, report(record))
    return path


def report(run: RunRecord) -> str:
    """The whole page."""
    state = state_of(run)
    charts = "".join(chart.html() for chart in charts_of(run))
    matrix, kept = confusion_matrix(run), samples(run)
    body = [
        _head(run, state),
        f'<section class="tiles">{tiles(run)}</section>',
        _warnings(run, state),
        f"<section><h2>Curves{_key_of_marks(run)}</h2>",
        f'<div class="charts">{charts}</div></section>' if charts else "<p>nothing has been logged yet</p></section>",
        _pair(_section("Confusion matrix", _card(matrix)), _section("By class", _card(by_class(run)))),
        _section("Sample predictions", _card(kept)),
        _pair(_section("Run file", _card(config_table(run))), _section("Code and machine", _card(machine_table(run)))),
        _section("What happened", _card(events_table(run))),
        f"<footer>made by bigtrain from <code>{escape(run.path)}</code></footer>",
    ]
    return page(f"{run.name} · bigtrain", "\n".join(body))


def page(title: str, body: str) -> str:
    """A page of HTML with the style that all of them have."""
    style = files("bigtrain.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(run: RunRecord, state: State) -> str:
    return (
        f'<header><h1>{escape(run.name)}<span class="status {state.word}">{state.word}</span></h1>'
        f"<p>{headline(run)}</p></header>"
    )


def _warnings(run: RunRecord, state: State) -> str:
    failure = f'<div class="failure"><code>{escape(state.error)}</code></div>' if state.error else ""
    lines = "".join(f'<li class="warning">{escape(line)}</li>' for line in warnings_of(run))
    inside = failure + (f"<ul>{lines}</ul>" if lines else "")
    return _section("Warnings", _card(inside))


def _key_of_marks(run: RunRecord) -> str:
    words = {"start": "went on from a checkpoint", "phase": "a phase began"}
    kinds = dict.fromkeys(mark.kind for mark in marks_of(run))
    return f"<small>{''.join(f'<i class={kind}></i>{words[kind]}' for kind in kinds)}</small>" if kinds else ""


def _pair(left: str, right: str) -> str:
    """Two sections beside each other where there is room."""
    return f'<div class="two">{left}{right}</div>' if left or right else ""


def _card(inside: str) -> str:
    return f'<div class="card">{inside}</div>' if inside else ""


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""
