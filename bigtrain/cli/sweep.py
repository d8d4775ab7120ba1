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
    from bigtrain.config.schema import Config
    from bigtrain.tracking.reading import RunRecord

_LONGEST_NAME = 100
# What may be otherwise in a run that is finished: its numbers are the same.
_SAME_NUMBERS = ("run.name", "run.dir", "launch", "track", "checkpoint", "profile", "engine", "health", "data.workers")


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
    target: Annotated[
        str | None, typer.Option("--target", help="local or slurm, instead of launch.target.", metavar="WHERE")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Nodes of each run, instead of launch.nodes.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="The cluster's profile, instead of launch.profile.", metavar="NAME")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Runs at once on a cluster.")] = 1,
    sort: Annotated[str | None, typer.Option("--sort", help="The metric that orders the table.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, or be submitted.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="On a cluster, return when it is submitted.")] = False,
) -> None:
    """Train a run file with every combination of values; what is finished is not run again.

    On this machine one run after another, on a cluster as one array of jobs; their table comes at the end.
    """
    from bigtrain.config.loader import check, load

    options = {"target": target, "nproc": nproc, "nodes": nodes, "profile": profile}
    given = [f"launch.{name}={value}" for name, value in options.items() if value is not None]
    keys, points = make_points(run_file, grid, given)
    for point in points:  # what is wrong with any of them is said before the first begins
        is_done(check(run_file, point.changes, launched=True).config)
    config = load(run_file, points[0].changes).config
    typer.echo(f"{len(points)} runs over {', '.join(keys) or 'nothing'}")
    if config.launch.target == "slurm":
        failed = _on_cluster(run_file, points, parallel, dry_run=dry_run, detach=detach)
    elif dry_run:
        failed = None
        for point in points:
            typer.echo(f"  {point.name}")
    else:
        failed = [point.name for point in points if not _run(run_file, point)]
    if failed is None:
        return
    _print_table(keys, points, Path(config.run.dir), sort)
    if failed:
        typer.echo(f"\nfailed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _on_cluster(
    run_file: Path, points: Sequence[Point], parallel: int, *, dry_run: bool, detach: bool
) -> list[str] | None:
    """Submit what is neither finished nor a job already, and wait for all; those that failed, or None."""
    from bigtrain.config.loader import load
    from launchers.allocate import Prepared, prepared
    from launchers.sweep import is_queued, submission_of, submit_sweep, wait_for

    configs = [load(run_file, point.changes).config for point in points]
    paths = [Path(config.run.dir, config.run.name) for config in configs]
    runs: list[Prepared] = []
    for config, path in zip(configs, paths, strict=True):
        if is_done(config):
            typer.echo(f"{path.name}: finished already")
        elif not is_queued(path):
            runs.append(prepared(config, run_file, debug=False))
    name = _base(run_file, points[0])
    if dry_run:
        if runs:
            submission = submission_of(runs, name, parallel)
            typer.echo(submission.text(), nl=False)
            typer.echo(submission.words(), err=True)
        return None
    if runs:
        submit_sweep(runs, name, parallel, typer.echo)
    if detach:
        typer.echo("the same command without --detach waits for the runs, and prints their table")
        return None
    try:
        return [path.name for path in wait_for(paths, typer.echo)]
    except KeyboardInterrupt:
        typer.echo("the runs go on; the same command waits for them again, and prints their table")
        raise typer.Exit(130) from None


def _base(run_file: Path, point: Point) -> str:
    """The name that the runs of a sweep have in common."""
    from bigtrain.config.loader import load

    return load(run_file, point.changes[:-1]).config.run.name  # the last change is the run's own name


def make_points(run_file: Path, grid: Sequence[str], given: Sequence[str] = ()) -> tuple[list[str], list[Point]]:
    """The keys that vary, and the runs: every combination, the last key varying fastest.

    Args:
        run_file: The run file.
        grid: `key=value,value`.
        given: `key=value`, for every run.

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
        points.append(Point(name, (*given, *changes, f"run.name={name}"), at))
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


def _run(run_file: Path, point: Point) -> bool:
    """Train one of them in processes of its own, as `bigtrain launch` does; whether it came to its end."""
    import sys

    from bigtrain.config.loader import load
    from bigtrain.terminal import print_line
    from launchers.foreground import run_in_foreground

    if is_done(load(run_file, point.changes).config):
        typer.echo(f"\n{point.name}: finished already")
        return True
    typer.echo(f"\n{point.name}")
    command = [sys.executable, "-m", "bigtrain", "launch", str(run_file), *point.changes]
    code, asked = run_in_foreground(command)
    if asked is not None:
        print_line("the sweep is stopped: the same command goes on with it")
        raise typer.Exit(128 + asked)
    if code in (130, 143):
        raise typer.Exit(code)
    return code == 0


def is_done(config: Config) -> bool:
    """Whether a run is finished; one that is asked for more than it has done is not.

    Raises:
        UserError: Where it was trained otherwise: its numbers must not stand in the table of this sweep.
    """
    from bigtrain.config.loader import diff, load
    from bigtrain.errors import ConfigError, UserError
    from bigtrain.runs import CONFIG, RESULT
    from bigtrain.starting import allowed_for

    path = Path(config.run.dir, config.run.name)
    if not (path / RESULT).exists():
        return False
    try:
        kept = load(path / CONFIG).config
    except ConfigError:  # of a version with other keys
        return True
    changes = [change for change in diff(kept, config) if not change.key.startswith(_SAME_NUMBERS)]
    others = [change for change in changes if change.key not in ("train.steps", "train.epochs")]
    if changes and (others or not allowed_for(config).finished):
        first = [*others, *changes][0]
        raise UserError(
            f"the run {config.run.name} is finished, and was another one: {first.key} was {first.before!r} and is "
            f"{first.after!r}",
            where=str(path),
            remedy="give the sweep another run.name, or delete that folder",
        )
    return not changes


def _print_table(keys: Sequence[str], points: Sequence[Point], folder: Path, sort: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from bigtrain.metrics import is_better_when_small, is_score
    from bigtrain.report.words import number
    from bigtrain.runs import is_run
    from bigtrain.tracking.reading import load_run

    found: dict[Point, RunRecord] = {p: load_run(folder / p.name) for p in points if is_run(folder / p.name)}
    names = list(dict.fromkeys(name for run in found.values() for name in run.metrics if is_score(name)))
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
