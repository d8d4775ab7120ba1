"""`bigtrain runs compare`: where runs differ, first in their run files, then in their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli.report import Folder, complete_run

if TYPE_CHECKING:
    from bigtrain.report.comparison import Comparison, Row


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B …", help="Runs: names or folders.", show_default=False, autocompletion=complete_run
        ),
    ],
    folder: Folder = Path("runs"),
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the curves over one another.", show_default=False)
    ] = None,
) -> None:
    """Compare runs: what differs in their run files, their metrics side by side, their curves over one another."""
    from bigtrain.errors import UserError
    from bigtrain.report.comparison import compare as put_beside
    from bigtrain.runs import write_atomically
    from bigtrain.tracking.reading import find_run

    if len(runs) < 2:
        raise UserError("one run is compared with nothing", remedy="name two or more: bigtrain runs compare A B")
    found = [find_run(run, folder) for run in runs]
    for record in found:
        for problem in record.problems:
            typer.echo(f"! {record.name}: {problem}")
    compared = put_beside(found)
    print_comparison(compared)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, compared.html())
        typer.echo(f"\n{html}")


def print_comparison(compared: Comparison) -> None:
    """Print where the run files differ, then the metrics."""
    differences = compared.differences()
    if differences:
        _print("run file", compared.names, differences)
    else:
        typer.echo("the run files say the same")
    typer.echo()
    _print("metric", compared.names, compared.measures())


def _print(heading: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(heading)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        cells = (Text(cell or "–", style="bold" if place == row.best else "") for place, cell in enumerate(row.cells))
        table.add_row(row.name, *cells)
    console.print(table)
