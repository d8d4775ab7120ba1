"""`bigtrain ckpt`: look at checkpoints, compare them, remove old ones, and take them to other libraries and back."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from bigtrain.checkpoint.looking import Comparison, Description, Difference, Verification

app = typer.Typer(help="Look at checkpoints, compare, remove, export and import them.", no_args_is_help=True)

Path_ = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint's folder, or a run's, or its name in runs/: its newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Best = Annotated[bool, typer.Option("--best", help="Of a run, the best checkpoint (checkpoint.keep_best).")]
Form = Literal["hf", "safetensors", "torch", "dcp", "deepspeed"]
OutForm = Literal["hf", "safetensors", "torch", "dcp", "deepspeed", "peft"]

_DAMAGED = 1
_DIFFERENT = 1
_SHOWN = 20


def _checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint that a path leads to: it itself, or the newest of a run, or the best."""
    from bigtrain.checkpoint import best_of, newest
    from bigtrain.errors import CheckpointError
    from bigtrain.runs import by_name, instead_of, is_run, run_at

    path = by_name(path)
    if best:
        return best_of(path)
    for folder in (path / "checkpoints", path):
        found = newest(folder) if folder.is_dir() else None
        if found:
            return found
    if (path / "checkpoints").is_dir() or is_run(path):
        raise CheckpointError(f"the run {path} has no checkpoint yet", where=str(path), remedy="let it save one")
    if not (path / "manifest.json").exists() and not path.name.startswith("step-"):
        held = "holds none" if path.is_dir() else "is no folder"
        ways = (
            "give a run's folder, its name where it is in runs/, or a checkpoint's folder (step-…);\n"
            "`bigtrain ckpt import` brings others' in"
        )
        raise CheckpointError(
            f"there is no checkpoint at {path}: it {held}",
            where=str(path),
            remedy=ways if path.is_dir() else instead_of(run_at(path), "", ways),
        )
    return path


@app.command()
def show(
    path: Path_,
    best: Best = False,
    as_json: Json = False,
    tensors: Annotated[bool, typer.Option(help="List them.")] = False,
) -> None:
    """Say what is in a checkpoint: step, who wrote it, parameters, size."""
    from bigtrain.checkpoint import describe, open_checkpoint

    found = describe(_checkpoint(path, best=best))
    with open_checkpoint(found.path) as reader:
        index = {
            f"{kind} {name}": [list(spec.shape), str(spec.dtype)[6:]] for (kind, name), spec in reader.index.items()
        }
    if as_json:
        typer.echo(json.dumps({**_plain(found), **({"tensors": index} if tensors else {})}, indent=2))
        return
    for line in _description(found):
        typer.echo(line)
    for name, (shape, dtype) in sorted(index.items()) if tensors else ():
        typer.echo(f"  {name}  {'×'.join(map(str, shape)) or 'scalar'}  {dtype}")


def _plain(found: Description) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "step": found.step,
        "writers": found.num_writers,
        "engine": found.extra.get("engine"),
        "parameters": found.num_parameters,
        "tensors_by_kind": found.num_tensors,
        "elements_by_kind": found.num_elements,
        "bytes": found.num_bytes,
        "left_out": found.extra.get("base", {}).get("path"),
        "samples": found.extra.get("samples"),
        "position": found.extra.get("position"),
        "evaluation": found.extra.get("evaluation"),
        "best": (found.extra.get("standings") or {}).get("best"),
    }


def _description(found: Description) -> Iterator[str]:
    extra = found.extra
    who = f"{extra['engine']} on " if "engine" in extra else ""
    yield f"{found.path}"
    yield f"  step          {found.step:,}" + (f", {extra['samples']:,} samples" if "samples" in extra else "")
    yield f"  written by    {who}{found.num_writers} process{'es' if found.num_writers > 1 else ''}"
    yield f"  parameters    {found.num_parameters:,}"
    yield "  tensors       " + ", ".join(f"{count:,} {kind}" for kind, count in found.num_tensors.items())
    if "base" in extra:
        yield f"  left out      {len(extra['base']['tensors']):,} frozen weights, which are in {extra['base']['path']}"
    yield f"  size          {found.num_bytes / 1e6:,.1f} MB"
    numbers = [f"{k} {v:.4f}" for k, v in (extra.get("evaluation") or {}).items() if isinstance(v, float)]
    if numbers:
        yield f"  evaluation    {', '.join(numbers)}"
    best = (extra.get("standings") or {}).get("best")
    if best and best["value"] is not None:
        is_it = "this one" if best["step"] == found.step else f"step {best['step']:,}"
        yield f"  best          {is_it}: {best['metric']} {best['value']:.6g}"
    if "brought_in" in extra:
        yield f"  brought in    from {extra['brought_in']['from']} ({extra['brought_in']['form']})"


@app.command()
def verify(path: Path_, best: Best = False, as_json: Json = False) -> None:
    """Read every byte and compare lengths and hashes; exit code 1 and the file's name where one is damaged."""
    from bigtrain.checkpoint import verify as check

    target = _checkpoint(path, best=best)
    with _progress("verifying", _size(target)) as advance:
        found = check(target, progress=advance)
    if as_json:
        typer.echo(json.dumps(_verified(found), indent=2))
    else:
        for fault in found.faults:
            typer.echo(f"{'DAMAGED' if fault.is_damage else 'UNREADABLE'}  {fault.file}: {fault.problem}")
        for name in found.strangers:
            typer.echo(f"not part of it: {name}")
        if found.is_good:
            typer.echo(f"{found.path}: good, {found.num_files} files, {found.num_bytes / 1e6:,.1f} MB")
    if not found.is_good:
        raise typer.Exit(_DAMAGED)


def _verified(found: Verification) -> dict[str, Any]:
    faults = [{"file": f.file, "problem": f.problem, "is_damage": f.is_damage} for f in found.faults]
    return {
        "path": str(found.path),
        "is_good": found.is_good,
        "files": found.num_files,
        "bytes": found.num_bytes,
        "faults": faults,
        "strangers": list(found.strangers),
    }


@app.command()
def diff(first: Path_, second: Path_, as_json: Json = False) -> None:
    """Compare two checkpoints by name: weights, moments, hyperparameters. Exit code 1 where they differ."""
    from bigtrain.checkpoint import diff as compare

    a, b = _checkpoint(first), _checkpoint(second)
    with _progress("comparing", _size(a)) as advance:
        found = compare(a, b, progress=advance)
    if as_json:
        typer.echo(json.dumps(_compared(found), indent=2))
    else:
        for each in found.differences[:_SHOWN]:
            largest = "" if each.largest is None else f", at most by {each.largest:.3g}"
            typer.echo(f"{each.kind} {each.name}: {each.what}{largest}")
        if len(found.differences) > _SHOWN:
            typer.echo(f"… and {len(found.differences) - _SHOWN} more; in all:")
            for kind in dict.fromkeys(each.kind for each in found.differences):
                typer.echo(f"  {_of_a_kind(kind, found.differences)}")
        typer.echo(f"{found.num_equal:,} tensors are equal to the last bit, {len(found.differences):,} things differ")
    if found.differences:
        raise typer.Exit(_DIFFERENT)


def _of_a_kind(kind: str, differences: Sequence[Difference]) -> str:
    """How many tensors or hyperparameters of a kind differ, and which one by most."""
    alike = [each for each in differences if each.kind == kind]
    measured = [each for each in alike if each.largest is not None]
    if not measured:
        return f"{kind}: {len(alike):,} differ"
    most = max(measured, key=lambda each: math.inf if math.isnan(each.largest or 0.0) else each.largest or 0.0)
    return f"{kind}: {len(alike):,} differ, at most by {most.largest:.3g} ({most.name})"


def _compared(found: Comparison) -> dict[str, Any]:
    different = [{"kind": d.kind, "name": d.name, "what": d.what, "largest": d.largest} for d in found.differences]
    return {"equal": found.num_equal, "differences": different}


@app.command()
def prune(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder or name, or a folder of checkpoints.")],
    keep: Annotated[int, typer.Option(min=2, help="How many of the newest stay.")] = 2,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Those of every so many steps stay, too.")] = None,
    as_json: Json = False,
) -> None:
    """Remove old checkpoints, and what killed starts left behind; the best one stays. A live run's are left alone."""
    from bigtrain import lease
    from bigtrain.checkpoint import find_best
    from bigtrain.checkpoint import prune as remove
    from bigtrain.errors import RunFolderError
    from bigtrain.runs import by_name, instead_of, run_at

    path = by_name(path)
    for run in (path, path.resolve().parent):  # a run's folder, or its checkpoints/
        holder = lease.live_holder(run)
        if holder:
            raise RunFolderError(
                f"the run {run.name} is in use by {holder}", remedy="it prunes by itself: checkpoint.keep"
            )
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (folder / "manifest.json").exists():
        raise RunFolderError(f"{folder} is one checkpoint", remedy=f"give the folder that holds them: {folder.parent}")
    if not folder.is_dir():
        remedy = instead_of(run_at(folder), "give a run's folder")
        raise RunFolderError(f"there is no folder {folder}", remedy=remedy)
    gone = remove(folder, keep, keep_every, stays=find_best(folder))
    if as_json:
        typer.echo(json.dumps({"removed": [str(each) for each in gone]}, indent=2))
        return
    for each in gone:
        typer.echo(f"removed {each}")
    typer.echo(f"{len(gone)} removed")


@app.command("export")
def export_(
    path: Path_,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to make.")],
    to: Annotated[OutForm, typer.Option("--to", help="What to make of it.")],
    best: Best = False,
    ema: Annotated[bool, typer.Option("--ema", help="The moving averages (optim.ema) instead of the weights.")] = False,
    base: Annotated[
        Path | None, typer.Option(help="Where the frozen weights are that it leaves out, should they have moved.")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, a safetensors or .pt file, a DCP, DeepSpeed or peft folder."""
    from bigtrain.doors import open_whole
    from bigtrain.doors.exporting import export
    from bigtrain.state import EMA

    target = _checkpoint(path, best=best)
    with (
        _leaving_nothing(),
        open_whole(target, instead=base) as reader,
        _progress("exporting", _size(target)) as advance,
    ):
        export(reader, out, to, advance, averaged=ema, base=base)
        leaves_averages = not ema and any(kind == EMA for kind, _ in reader.index)
    typer.echo(f"{out}: step {reader.step} of {target}, as {to}" + (", averages of weights" if ema else ""))
    if leaves_averages:
        typer.echo("it has the weights themselves; their averages (optim.ema) are written with --ema", err=True)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="IN", help="What another library wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for checkpoints; one is added.")],
    form: Annotated[Form, typer.Option("--from", help="What it is.")],
    allow_pickle: Annotated[
        bool, typer.Option(help="Read pickles, which can run any code: only of people you trust.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a checkpoint of what another library wrote, the optimizer's state included where there is one."""
    from bigtrain.doors.incoming import bring_in

    with _leaving_nothing(), _progress("reading", None) as advance:
        made = bring_in(path, folder, form, allow_pickle=allow_pickle, progress=advance)
    typer.echo(json.dumps({"path": str(made)}) if as_json else f"{made}")


def _size(path: Path) -> int | None:
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else None


@contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Let TERM end what goes on as Ctrl-C does, which takes away what is half written."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def once_more(lost: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
        if number is None:
            hook(lost)
        else:  # it came in the middle of a destructor, which Python lets nothing be raised from, nor from this function
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    before, hook = signal.signal(signal.SIGTERM, leave), sys.unraisablehook
    sys.unraisablehook = once_more
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


@contextmanager
def _progress(word: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(word, total=total)
        yield lambda count: progress.advance(task, count)
