"""`bigtrain report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunName = Annotated[str, typer.Argument(metavar="NAME", help="A run's name, or its folder.", show_default=False)]
Folder = Annotated[Path, typer.Option("--dir", help="The folder of all runs, in which names are looked for.")]


def report(run: RunName, folder: Folder = Path("runs")) -> None:
    """Write a run's report.html: one file that needs no network, for a browser or a mail."""
    from bigtrain.report import write_report
    from bigtrain.report.words import num_bytes
    from bigtrain.tracking.reading import find_run

    path = write_report(find_run(run, folder))
    typer.echo(f"{path} ({num_bytes(path.stat().st_size)})")
