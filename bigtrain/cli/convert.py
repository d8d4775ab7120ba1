"""`bigtrain convert`: another library's configuration as a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON or YAML.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The run file to write, instead of printing it.", show_default=False),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="deepspeed, accelerate or training-arguments; found out by default.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--gpus", "--nproc", min=1, help="The processes it was written for: batches there are of each."),
    ] = 1,
) -> None:
    """Turn a DeepSpeed or Accelerate configuration, or TrainingArguments as JSON, into a run file.

    What has no equivalent is listed, each with the reason.
    """
    from bigtrain.config.loader import from_dict
    from bigtrain.convert import convert as read
    from bigtrain.errors import UserError
    from bigtrain.runs import write_atomically

    found = read(file, kind=kind, processes=processes)
    from_dict(found.whole())  # what comes out must be a run file
    if out is None:
        typer.echo(found.text(), nl=False)
        return
    if out.exists():
        raise UserError(f"{out} is there already", where="--out", remedy="name another file")
    write_atomically(out, found.text())
    typer.echo(f"{out}, made from a configuration of {found.kind}")
    for key, reason in found.left.items():
        typer.echo(f"no equivalent: {key}: {reason}")
