"""`bigtrain config`: look at run files and at what may stand in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def _complete_key(incomplete: str) -> list[str]:
    """Keys of the run file, for the shell, and after an = the words that a key takes."""
    from bigtrain.config.keys import all_keys, words_of

    key, sign, begun = incomplete.partition("=")
    if sign:
        return [f"{key}={word}" for word in words_of(key) if word.startswith(begun)]
    key = _key_before()
    if key:
        return [word for word in words_of(key) if word.startswith(incomplete)]
    keys = [key.path for key in all_keys() if not key.is_section and "[]" not in key.path]
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def _key_before() -> str:
    """The key whose value is being written, where the shell takes the = for a word of its own, as bash does."""
    words, place = os.environ.get("COMP_WORDS", "").split(), os.environ.get("COMP_CWORD", "")
    number = int(place) if place.isdecimal() else 0
    for sign in (number, number - 1):
        if sign > 0 and words[sign : sign + 1] == ["="]:
            return words[sign - 1]
    return ""


app = typer.Typer(no_args_is_help=True, help="Look at run files and their keys.")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the file's, as optim.lr=3e-4.",
        show_default=False,
        autocompletion=_complete_key,
    ),
]


@app.command()
def show(
    run_file: RunFile,
    overrides: Overrides = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value came from.")] = False,
) -> None:
    """Print a run file with everything that holds."""
    from bigtrain.config.keys import show as yaml_of
    from bigtrain.config.loader import dump, load, values

    resolved = load(run_file, overrides or ())
    if not origin:
        typer.echo(dump(resolved.config), nl=False)
        return
    rows = [(key, yaml_of(value), resolved.origin[key]) for key, value in values(resolved.config).items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, where in rows:
        typer.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {where}")


@app.command()
def check(run_file: RunFile, overrides: Overrides = None) -> None:
    """Say all that is wrong with a run file, or ok."""
    from bigtrain.config.loader import check as check_file

    check_file(run_file, overrides or (), launched=True)
    typer.echo(f"ok: {run_file}")


@app.command()
def keys(
    section: Annotated[str | None, typer.Argument(help="A section or a key, as optim.", show_default=False)] = None,
) -> None:
    """List the keys of a run file with their help."""
    from bigtrain.config.nearest import keys_below

    _print_table([(key.path, key.kind, key.default or "", key.help) for key in keys_below(section or "")])


def _print_table(rows: list[tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("takes", ratio=3)
    table.add_column("default", ratio=1)
    table.add_column("help", ratio=4)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run file, for editors."""
    import json

    from bigtrain.config.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
