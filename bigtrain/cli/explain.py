"""`bigtrain explain`: what a run will do, without starting it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli.config import Overrides, RunFile

if TYPE_CHECKING:
    from rich.table import Table

    from bigtrain.explain import Explanation, Footprint

_GIB = 1 << 30


def explain(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option("--gpus", "--nproc", min=1, help="Processes, one for each GPU, instead of launch.nproc."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.001, help="GiB of a GPU's memory, instead of that of a GPU here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a run will do, and the memory it needs under every engine, without starting it."""
    from bigtrain.config.loader import check
    from launchers.plan import make_plan

    changes = overrides or ()
    config = check(run_file, changes).config
    world_size = make_plan(config, run_file, changes, nproc=processes).nproc
    from bigtrain.explain import explain as find_out
    from bigtrain.explain.words import sections, title, warnings

    memory = None if gpu_memory is None else round(gpu_memory * _GIB)
    explained = find_out(config, world_size=world_size, gpu_memory=memory)
    if as_json:
        import json

        words = {"title": title(explained), **sections(explained), "warnings": warnings(explained)}
        typer.echo(json.dumps({**explained.as_dict(), "words": words}, indent=2))
    else:
        _print(explained)


def _print(explained: Explanation) -> None:
    from rich.console import Console

    from bigtrain.explain.words import sections, title, warnings

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)

    say(title(explained), "bold")
    for heading, lines in sections(explained).items():
        say(f"\n{heading}", "bold")
        if heading == "memory":
            console.print(_table(explained))
        for line in lines:
            say(f"  {line}")
    for number, line in enumerate(warnings(explained)):
        say(f"{'' if number else chr(10)}! {line}", "yellow")


def _table(explained: Explanation) -> Table:
    from rich.table import Table

    memory = explained.gpu_memory
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  engine")
    columns = ["processes", "weights", "fp32 masters", "working", "gradients", "optimizer", "together"]
    for heading in columns if memory is None else [*columns, "left"]:
        table.add_column(heading, justify="right")
    for each in explained.footprints:
        is_chosen = each == explained.chosen
        name = f"{'→' if is_chosen else ' '} {each.label}"
        table.add_row(name, str(each.world_size), *_cells(each, memory), style="bold" if is_chosen else None)
    return table


def _cells(each: Footprint, memory: int | None) -> list[str]:
    from bigtrain.explain.words import size_of

    if each.refusal:
        return ["–"] * (6 if memory is None else 7)
    cells = [
        ("?" if value is None else size_of(value) if value else "–") + ("*" if part in each.on_host else "")
        for part in ("weights", "masters", "working", "gradients", "optimizer")
        for value in (getattr(each, part),)
    ]
    cells.append(size_of(each.on_device))
    if memory is not None:
        left = memory - each.on_device
        cells.append(size_of(left) if left >= 0 else f"-{size_of(-left)}")
    return cells
