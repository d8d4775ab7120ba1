"""`bigtrain runs`: the runs there are, and what they came to."""

from __future__ import annotations

import typer

from bigtrain.cli.compare import compare

app = typer.Typer(no_args_is_help=True, help="Look at runs.")
app.command()(compare)


@app.callback()
def _group() -> None:
    """Look at runs."""  # without a callback, a group of one command would be that command
