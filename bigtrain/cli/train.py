"""`bigtrain train` and `bigtrain launch`: the same program, in this process or in several."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from bigtrain.cli.config import Overrides, RunFile

if TYPE_CHECKING:
    from bigtrain.config.schema import Config

NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on each machine, instead of launch.nproc.")
]


class InOneProcess(TyperCommand):
    """A command that refuses the options of `launch` by name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was given; see `launch`, for its options.

        Raises:
            UserError: Where one of them is given.
        """
        from shlex import join

        from bigtrain.errors import UserError

        launch = ctx.find_root().command.get_command(ctx, "launch")
        own = {name for param in self.params for name in param.opts}
        options = {name for param in launch.params for name in param.opts} - own
        for given in args:
            name = given.partition("=")[0]
            if name.startswith("-") and name in options:
                problem = f"bigtrain {ctx.info_name} runs in this process: it takes no {name}, bigtrain launch does"
                raise UserError(problem, remedy=join(["bigtrain", "launch", *args]))
        return super().parse_args(ctx, args)


def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank where a launcher set RANK and WORLD_SIZE."""
    import os

    from bigtrain.beats import AGAIN
    from bigtrain.early import StoppedEarly, stopped_by_signals
    from bigtrain.runs import ATTEMPT_VARIABLE

    is_rank = ATTEMPT_VARIABLE in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    config: Config | None = None
    try:
        with nullcontext() if is_rank else stopped_by_signals():
            from bigtrain.config.loader import check

            # Before torch is imported: what is wrong with the file is said at once.
            config = check(run_file, overrides or ()).config
            from bigtrain.running import train as train_run

            run = train_run(run_file, overrides or ())
    except StoppedEarly:
        _tell_early_stop(config, took_steps=False)
        raise
    except KeyboardInterrupt as wish:  # the second one: the first waits for the end of a step
        if is_rank:
            leave_at_once()
        _tell_early_stop(config, took_steps=True)
        leave(getattr(wish, "code", _STOPPED))  # a thread that still writes would end it badly
    except BaseException as error:
        if not is_rank or (config is None and isinstance(error, Exception)):
            raise
        leave_at_once()
    if is_rank and (run.outcome.again or ATTEMPT_VARIABLE in os.environ):
        leave(AGAIN if run.outcome.again else 0)
    if run.outcome.again:
        raise typer.Exit(AGAIN)
    # A launcher knows that it asked the ranks to stop: for them that is no failure.
    if run.outcome.stopped and ATTEMPT_VARIABLE not in os.environ:
        raise typer.Exit(_STOPPED)


def _tell_early_stop(config: Config | None, *, took_steps: bool) -> None:
    from bigtrain.starting import word_of_early_stop
    from bigtrain.terminal import print_line

    path = Path(config.run.dir, config.run.name) if config else None
    goes_on = config is None or config.checkpoint.resume == "auto"
    print_line(word_of_early_stop(path, goes_on=goes_on, took_steps=took_steps))


# What a shell reports of a program that was interrupted.
_STOPPED = 130


def leave(code: int) -> NoReturn:
    """End a rank that is done, or a process that was interrupted, past the interpreter's own end.

    There, a thread of gloo that still wants the interpreter's lock is ended in the middle of C++, which ends the rank
    with SIGABRT ("terminate called without an active exception"): it was seen twice in some hundreds of starts. A
    process that was forked goes past it by itself, and torchrun's agent waits for the word that it has come to its end.
    """
    import multiprocessing
    import os
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and multiprocessing.parent_process() is not None:
        sys.exit(0)
    os._exit(code)


def leave_at_once() -> NoReturn:
    """End a failed rank without waiting for the others, which may be in a collective with it."""
    import os
    import sys
    import traceback

    from bigtrain.errors import BigtrainError
    from bigtrain.runs import ATTEMPT_VARIABLE

    error = sys.exc_info()[1]
    # The launcher tells what rank 0 of its own failed of; every other rank has a log.
    if ATTEMPT_VARIABLE not in os.environ or os.environ.get("RANK") != "0":
        traceback.print_exc()
    leave(error.exit_code if isinstance(error, BigtrainError) else 1)
