"""`bigtrain sweep`: a grid of runs, one after another, and their table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli.config import RunFile
from bigtrain.cli.train import NumProcesses

if TYPE_CHECKING:
    from bigtrain.tracking.reading import RunRecord

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: The run's name.
        changes: What the command line changes for it.
        values: Its values of the keys that the sweep varies.
    """

    name: str
    changes: tuple[str, ...]
    values: tuple[str, ...]


def sweep(
    run_file: RunFile,
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE[,VALUE …]",
            help="Values for keys of the run file, several separated by commas, as optim.lr=1e-4,3e-4.",
            show_default=False,
        ),
    ],
    nproc: NumProcesses = None,
    sort: Annotated[str | None, typer.Option("--sort", help="The metric that orders the table.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run.")] = False,
) -> None:
    """Train a run file with every combination of values, one run after another; what is finished is not run again."""
    from bigtrain.config.loader import check, load

    keys, points = make_points(run_file, grid)
    for point in points:
        check(run_file, point.changes, launched=True)  # what is wrong with any of them is said before the first begins
    typer.echo(f"{len(points)} runs over {', '.join(keys) or 'nothing'}")
    if dry_run:
        for point in points:
            typer.echo(f"  {point.name}")
        return
    failed = [point.name for point in points if not _run(run_file, point, nproc)]
    folder = Path(load(run_file, points[0].changes).config.run.dir)
    _print_table(keys, points, folder, sort)
    if failed:
        typer.echo(f"\nfailed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def make_points(run_file: Path, grid: Sequence[str]) -> tuple[list[str], list[Point]]:
    """The keys that vary, and the runs: every combination, the last key varying fastest.

    Raises:
        UserError: Where something is no `key=value`, or a key is given twice.
    """
    from bigtrain.config.loader import load
    from bigtrain.errors import UserError

    choices: dict[str, list[str]] = {}
    for text in grid:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} gives no values", remedy="write key.path=VALUE,VALUE, as optim.lr=1e-4,3e-4")
        if key in choices:
            raise UserError(f"{key} is given twice", remedy=f"write {key}=VALUE,VALUE once")
        choices[key] = list(split_values(values))
    base = load(run_file, [f"{key}={values[0]}" for key, values in choices.items()]).config.run.name
    varied = [key for key, values in choices.items() if len(values) > 1]
    points = []
    for combination in itertools.product(*choices.values()):
        changes = [f"{key}={value}" for key, value in zip(choices, combination, strict=True)]
        held = dict(zip(choices, combination, strict=True))
        at = tuple(held[key] for key in varied)
        name = _name(base, varied, at)
        points.append(Point(name, (*changes, f"run.name={name}"), at))
    if len({point.name for point in points}) < len(points):
        points = [
            Point(f"{point.name}-{number}", (*point.changes[:-1], f"run.name={point.name}-{number}"), point.values)
            for number, point in enumerate(points)
        ]
    return varied, points


def split_values(text: str) -> Iterator[str]:
    """The values in a list separated by commas; those inside brackets, braces and quotes do not separate."""
    depth, quote, begin = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[begin:place].strip()
            begin = place + 1
    yield text[begin:].strip()


def _name(base: str, keys: Sequence[str], values: Sequence[str]) -> str:
    parts = [f"{key.rpartition('.')[2]}{value}" for key, value in zip(keys, values, strict=True)]
    return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in [base, *parts])[:_LONGEST_NAME]


def _run(run_file: Path, point: Point, nproc: int | None) -> bool:
    """Train one of them in processes of its own, as `bigtrain launch` does; whether it came to its end."""
    import subprocess
    import sys

    from bigtrain.config.loader import load

    run = load(run_file, point.changes).config.run
    if (Path(run.dir, run.name) / "result.json").exists():
        typer.echo(f"\n{point.name}: finished already")
        return True
    typer.echo(f"\n{point.name}")
    processes = [] if nproc is None else [f"--nproc={nproc}"]
    command = [sys.executable, "-m", "bigtrain", "launch", str(run_file), *point.changes, *processes]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if code in (130, 143):
        raise typer.Exit(code)
    return code == 0


def _print_table(keys: Sequence[str], points: Sequence[Point], folder: Path, sort: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from bigtrain.metrics import is_better_when_small
    from bigtrain.report.words import number
    from bigtrain.tracking.reading import is_run, load_run

    found: dict[Point, RunRecord] = {p: load_run(folder / p.name) for p in points if is_run(folder / p.name)}
    names = list(dict.fromkeys(name for run in found.values() for name in run.metrics if name.startswith("eval/")))
    names = [*names[:3], "train/loss"]
    order = sort or names[0]
    sign = 1 if is_better_when_small(order) else -1

    def place(point: Point) -> float:
        value = found[point].metrics.last().get(order) if point in found else None
        return float("inf") if value is None else sign * value

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("run", *keys, *names):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for point in sorted(points, key=place):
        last = found[point].metrics.last() if point in found else {}
        table.add_row(point.name, *point.values, *(number(last[name]) if name in last else "–" for name in names))
    console.print()
    console.print(table)
