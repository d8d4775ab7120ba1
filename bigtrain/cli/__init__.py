"""The `bigtrain` command: one module for each group of commands.

Every command starts with the import of this package, so its modules import nothing heavy at their top: a
command that needs torch, or the schema, imports it in its body.
"""

from __future__ import annotations

import errno
import os
import sys
from types import TracebackType
from typing import Annotated, NoReturn

import typer

import bigtrain
from bigtrain.cli import ckpt, config, data, runs
from bigtrain.cli.convert import convert
from bigtrain.cli.doctor import doctor
from bigtrain.cli.evaluate import evaluate, predict
from bigtrain.cli.explain import explain
from bigtrain.cli.init import init
from bigtrain.cli.launch import launch
from bigtrain.cli.parity import parity
from bigtrain.cli.replay import replay
from bigtrain.cli.report import report
from bigtrain.cli.sweep import sweep
from bigtrain.cli.train import InOneProcess, train
from bigtrain.cli.try_run import try_run
from bigtrain.errors import BigtrainError, ConfigError, SetupError
from bigtrain.terminal import has_gone, print_line, print_nowhere, settle_outputs

app = typer.Typer(
    name="bigtrain",
    help="Train and fine-tune PyTorch models: one run file, several engines, the same losses under each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(runs.app, name="runs")
app.command("try")(try_run)
app.command("eval")(evaluate)
app.command(cls=InOneProcess)(train)
for command in (launch, parity, explain, predict, report, init, sweep, convert, replay, doctor):
    app.command()(command)

_wants_traceback = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bigtrain {bigtrain.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    global _wants_traceback
    _wants_traceback = debug


# What a disk refuses with: the place and the reason say all there is to say.
_REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    """Run the command line; an error of ours is told in a few lines and sets the exit code, and so is a disk's."""
    settle_outputs()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # what is not written by now would fail when Python has left, with a code of its own
    except BigtrainError as error:
        _end(error)
    except OSError as error:
        if not _is_somewhere():
            _end(SetupError("the current directory is gone", remedy="go to one that is there: cd"))
        if error.filename is None and has_gone(sys.stdout):
            print_nowhere(1)
            problem = f"standard output takes nothing: {error.strerror}"
            _end(BigtrainError(problem, remedy="print to a place that takes it"))
        if error.errno not in _REFUSALS or error.filename is None:
            _show(error)
        remedy = "give a place that you may write to, with room for it"
        _end(BigtrainError(f"{error.strerror}: {os.fsdecode(error.filename)}", remedy=remedy))
    except Exception as error:
        _show(error)


def _is_somewhere() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _show(error: Exception) -> NoReturn:
    """Show an error of somebody else's code from the command on: what called that says nothing of what went wrong."""
    if not _wants_traceback:
        error.__traceback__ = _below_the_command(error.__traceback__)
    sys.excepthook(type(error), error, error.__traceback__)  # torch's own, where there are ranks
    sys.exit(1)


def _below_the_command(frames: TracebackType | None) -> TracebackType | None:
    """The frames that a command called."""
    below = frames
    while frames is not None:
        if frames.tb_frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
            below = frames.tb_next or below
        frames = frames.tb_next
    return below


def _end(error: BigtrainError) -> NoReturn:
    if _wants_traceback:
        import traceback

        traceback.print_exc()
    for part in error.problems if isinstance(error, ConfigError) else [error]:
        print_line(f"error: {part}".encode(errors="backslashreplace").decode(), 2)
    sys.exit(error.exit_code)
