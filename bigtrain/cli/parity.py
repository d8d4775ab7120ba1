"""`bigtrain parity`: is it the same training under every engine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli.config import Overrides, RunFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigtrain.parity import Report


def parity(
    run_file: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare.")] = 20,
    engines: Annotated[
        str, typer.Option(help="Engines, separated by commas; deepspeed:2 is stage 2. By default all.")
    ] = "",
    world_sizes: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "1,2",
    precisions: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "fp32,fp64,bf16",
    compiles: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile, too; by default where there is a compiler.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the run under every engine, world size, accumulation and activation checkpointing with a plain loop.

    Exit code 0: the same; 1: something differs; 3: rounding alone differs too soon to tell.
    """
    from bigtrain.config.loader import check

    config = check(run_file, overrides or ()).config
    names = _named(engines, _ENGINES, "engine", "--engines") if engines else None
    numbers = _named(precisions, ("fp32", "fp64", "bf16"), "precision", "--precisions")
    sizes = _sizes(world_sizes)
    from bigtrain.parity import run

    def say(text: str) -> None:
        typer.echo(f"… {text}", err=True)

    report = run(config, steps=steps, engines=names, world_sizes=sizes, precisions=numbers, compiles=compiles, said=say)
    if as_json:
        import json

        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    raise typer.Exit(report.exit_code)


_ENGINES = ("single", "ddp", "fsdp", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3")


def _named(text: str, known: Sequence[str], what: str, option: str) -> list[str]:
    """The names in a list separated by commas, each of which must be known."""
    from bigtrain.errors import UserError

    remedy = f"take some of {', '.join(known)}"
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            article = "an" if what[0] in "aeiou" else "a"
            raise UserError(f"{name!r} is not {article} {what}", where=option, remedy=remedy)
    if not names:
        raise UserError(f"no {what} is named", where=option, remedy=remedy)
    return names


def _sizes(text: str) -> list[int]:
    from bigtrain.errors import UserError

    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(
            f"{text!r} is not a list of numbers of processes",
            where="--world-sizes",
            remedy="write it as 1,2,4",
        )
    return sizes


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (
        "engine",
        "processes",
        "accumulation",
        "recomputed",
        "compiled",
        "precision",
        "steps that count",
        "loss",
        "norm",
        "parameters",
        "",
    ):
        table.add_column(
            heading, justify="right" if heading not in ("engine", "recomputed", "compiled", "precision", "") else "left"
        )
    for verdict in report.verdicts:
        variant = verdict.variant
        is_exact = variant.precision != "bf16"
        parameters = f"{verdict.parameters:.1e}" if is_exact else f"× {verdict.parameters:.2f}"
        largest = (f"{verdict.loss:.1e}", f"{verdict.norm:.1e}", parameters)
        cells = (
            variant.engine,
            variant.world_size,
            variant.accumulation,
            variant.recompute,
            variant.compiled,
            variant.precision,
            verdict.horizon,
        )
        table.add_row(*map(str, cells), *largest, verdict.outcome)
    console.print(table)
    for line in _remarks(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _remarks(report: Report) -> list[str]:
    tolerances = ", ".join(
        f"{name}: {t.scalar:g} for loss and norm, {t.parameters:g} for all parameters"
        for name, t in report.tolerances.items()
    )
    lines = [f"largest relative differences to a plain loop in the steps that count; allowed are {tolerances}"]
    if any(verdict.variant.precision == "bf16" for verdict in report.verdicts):
        lines.append(
            "bf16: loss and norm of the first step to those of single in bf16; parameters: the distance from fp32 as a "
            "multiple of single's"
        )
    if report.switched_off:
        lines.append(f"switched off to compare: {', '.join(report.switched_off)}")
    if report.apart:
        lines.append(f"left out, because their true gradient is zero: {', '.join(report.apart)}")
    for verdict in report.verdicts:
        if verdict.failed_at is not None:
            lines.append(
                f"{verdict.variant}: {verdict.failed_what} parts at step {verdict.failed_at}"
                + (f"; furthest off is {verdict.worst} in {verdict.worst_module}" if verdict.worst else "")
            )
    if any(verdict.outcome == "inconclusive" for verdict in report.verdicts):
        lines.append(
            "inconclusive: a plain loop differs from itself by rounding alone after fewer than 5 steps; ask in fp64, "
            "where rounding is far smaller (--precisions fp64, but for DeepSpeed, which has none)"
        )
    return lines
