"""`bigtrain report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names of runs, for the shell."""
    folder = Path(context.params.get("folder") or "runs")
    names = [path.parent.name for path in folder.glob("*/config.yaml")]
    return sorted(name for name in names if name.startswith(incomplete))


RunName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A run's name, or its folder.", show_default=False, autocompletion=complete_run
    ),
]
Folder = Annotated[Path, typer.Option("--dir", help="The folder of all runs, in which names are looked for.")]


def report(run: RunName, folder: Folder = Path("runs")) -> None:
    """Write a run's report.html: one file that needs no network, for a browser or a mail."""
    from bigtrain.report import write_report
    from bigtrain.report.words import num_bytes
    from bigtrain.tracking.reading import find_run

    found = find_run(run, folder)
    path = write_report(found)
    for problem in found.problems:
        typer.echo(f"! {problem}")
    typer.echo(f"{path} ({num_bytes(path.stat().st_size)})")
