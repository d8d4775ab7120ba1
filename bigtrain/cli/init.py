"""`bigtrain init`: a commented run file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _tasks(incomplete: str) -> list[str]:
    from bigtrain.config.starting_files import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def init(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[TASK]", help="What is to be learnt.", show_default=False, autocompletion=_tasks),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented run file to start from; without a task, list those there are."""
    from bigtrain.config.starting_files import KINDS, starting_file
    from bigtrain.errors import UserError
    from bigtrain.runs import write_atomically

    if kind is None:
        for name, start in KINDS.items():
            typer.echo(f"{name:<22}{start.about}")
        return
    text = starting_file(kind)
    if out.exists() and not force:
        remedy = f"name another file, as -o {out.stem}-2.yaml, or take --force to replace it"
        raise UserError(f"{out} is there already", where="--out", remedy=remedy)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)
    typer.echo(
        f"{out}\ncheck it: bigtrain config check {out}\ntry it:   bigtrain try {out}\ntrain:    bigtrain launch {out}"
    )
