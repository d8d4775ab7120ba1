"""`bigtrain runs`: which runs there are, how they stand, what they print; stop one, go on with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli.compare import compare
from bigtrain.cli.config import Overrides
from bigtrain.cli.report import RunName as Name

app = typer.Typer(no_args_is_help=True, help="Look after runs, and compare them.")
app.command()(compare)

Folder = Annotated[Path, typer.Option("--dir", help="The folder of all runs.", metavar="FOLDER")]


@app.command("list")
def list_runs(
    folder: Folder = Path("runs"),
    sort: Annotated[
        str | None,
        typer.Option("--sort", help="A metric, as eval/accuracy: the best first, and shown.", metavar="METRIC"),
    ] = None,
) -> None:
    """List the runs of a folder, the newest first."""
    from bigtrain.runs import is_run
    from bigtrain.tracking.wording import decimal
    from launchers.follow import standing

    paths = [path for path in folder.glob("*") if is_run(path)] if folder.is_dir() else []
    if not paths:
        typer.echo(f"there are no runs in {folder}")
        return
    stands = sorted(((standing(path), path) for path in paths), key=lambda pair: -pair[0].since)
    values = _values(paths, sort) if sort else {}
    if sort:  # runs without the metric come last, the newest first
        stands.sort(key=lambda pair: _rank(sort, values.get(pair[1])))
    added = [] if sort is None or sort.removeprefix("train/") == "loss" else [sort]
    rows: list[tuple[str, ...]] = [("name", "state", "step", "loss", *added, "since", "where")]
    for found, path in stands:
        numbers = ["" if found.step is None else str(found.step), "" if found.loss is None else decimal(found.loss)]
        if added:
            numbers.append(decimal(values[path]) if path in values else "")
        rows.append((path.name, found.state, *numbers, _time(found.since), found.where))
    _table(rows)


def _values(paths: Sequence[Path], metric: str) -> dict[Path, float]:
    """The last value of a metric in the runs that have it.

    Raises:
        UserError: Where none has.
    """
    from bigtrain.errors import UserError
    from bigtrain.named import suggest
    from bigtrain.tracking.reading import load_run

    of_runs = {path: load_run(path).metrics for path in paths}
    found = {path: float(metrics[metric].values[-1]) for path, metrics in of_runs.items() if metric in metrics}
    if not found:
        known = sorted({name for metrics in of_runs.values() for name in metrics})
        raise UserError(f"no run here has {metric!r}", where="--sort", remedy=suggest(metric, known, "metrics"))
    return found


def _rank(metric: str, value: float | None) -> tuple[bool, float]:
    from bigtrain.metrics import is_better_when_small

    if value is None or value != value:
        return True, 0.0
    return False, value if is_better_when_small(metric) else -value


@app.command()
def show(name: Name, folder: Folder = Path("runs")) -> None:
    """Show how a run stands, and how each of its starts went."""
    from bigtrain.runs import attempts, read_json
    from launchers.follow import has_no_launcher, standing

    path = _find(name, folder)
    found = standing(path)
    typer.echo(f"{path}: {found.state} since {_time(found.since)}" + (f", {found.where}" if found.where else ""))
    if found.step is not None:
        typer.echo(f"step {found.step}, loss {found.loss:.6g}")
    if found.cause:
        typer.echo(f"cause: {found.cause}")
    saved = sorted(entry.parent.name for entry in (path / "checkpoints").glob("step-*/manifest.json"))
    typer.echo(f"checkpoints: {', '.join(saved) or 'none'}")
    rows = [("start", "began", "ended", "from step", "how", "cause")]
    for attempt in attempts(path):
        start, end = read_json(attempt / "start.json"), read_json(attempt / "end.json")
        if start:
            step = start.get("step", -1)
            began, ended = _time(start["time"]), _time(end["time"]) if end else ""
            how = end.get("outcome", "running" if not found.is_over else "broken off")
            rows.append((attempt.name, began, ended, str(max(step, 0)), how, end.get("cause") or ""))
        elif has_no_launcher(attempt):
            rows.append(
                (attempt.name, _time(attempt.stat().st_ctime), "", "", "in one process, without a launcher", "")
            )
        else:
            is_waiting = not found.is_over and attempt == attempts(path)[-1]
            rows.append((attempt.name, "", "", "", found.state if is_waiting else "not begun", ""))
    _table(rows)


@app.command()
def logs(
    name: Name,
    is_followed: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run is over.")] = False,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Of which rank.")] = 0,
    folder: Folder = Path("runs"),
) -> None:
    """Print what a rank prints, over restarts; while the run waits in a queue, why."""
    from launchers.follow import follow, print_logs

    path = _find(name, folder)
    if is_followed:
        raise typer.Exit(follow(path, typer.echo, rank=rank))
    print_logs(path, typer.echo, rank=rank)


@app.command()
def stop(
    name: Name,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
    folder: Folder = Path("runs"),
) -> None:
    """Have a run save and leave after its current step."""
    from launchers.follow import stop as stop_run

    typer.echo(stop_run(_find(name, folder), now=now))


@app.command()
def resume(
    context: typer.Context,
    name: Name,
    overrides: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once, and leave it running.")] = False,
    folder: Folder = Path("runs"),
) -> None:
    """Start a run again as it was started, from its last checkpoint."""
    from bigtrain.cli.launch import launch

    path = _find(name, folder)
    given = [f"run.dir={path.parent}", f"run.name={path.name}", *(overrides or ())]
    launch(context, _run_file(path), given, detach=detach)


def _run_file(path: Path) -> Path:
    from bigtrain.errors import RunFolderError
    from bigtrain.runs import CONFIG

    submitted = sorted(path.glob("attempts/*/submit/run.yaml"), key=lambda file: int(file.parts[-3]))
    for file in (path / CONFIG, *reversed(submitted)):
        if file.is_file():
            return file
    raise RunFolderError(f"the run {path.name} has not begun", where=str(path), remedy="start it with bigtrain launch")


def _find(name: str, folder: Path) -> Path:
    """The folder of a run.

    Raises:
        RunFolderError: Where there is none of this name, with the nearest ones.
    """
    from bigtrain.errors import RunFolderError
    from bigtrain.runs import instead_of, is_run

    for path in (folder / name, Path(name)):
        if is_run(path):
            return path.resolve()
    remedy = instead_of(folder / name, "give the folder of all runs with --dir")
    raise RunFolderError(f"there is no run {name} in {folder}", remedy=remedy)


def _time(seconds: float) -> str:
    import time

    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
