"""`bigtrain train` and `bigtrain launch`: the same program, in this process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bigtrain.cli.config import Overrides, RunFile

NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on this machine, instead of launch.nproc.")
]


def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank where a launcher set RANK and WORLD_SIZE."""
    import os

    from bigtrain.config.loader import load

    load(run_file, overrides or ())  # before torch is imported: what is wrong with the file is said at once
    from bigtrain.running import train as train_run
    from bigtrain.runs import ATTEMPT_VARIABLE

    is_rank = ATTEMPT_VARIABLE in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        run = train_run(run_file, overrides or ())
    except BaseException:
        if not is_rank:
            raise
        leave_at_once()
    # A launcher knows that it asked the ranks to stop: for them that is no failure.
    if run.outcome.stopped and ATTEMPT_VARIABLE not in os.environ:
        raise typer.Exit(_STOPPED)


# What a shell reports of a program that was interrupted.
_STOPPED = 130


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, BigtrainError) else 1)


def launch(
    context: typer.Context,
    run_file: RunFile,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
) -> None:
    """Start the run on this machine in several processes, through torchrun."""
    from contextlib import suppress

    from bigtrain import runs
    from bigtrain.config.loader import load
    from bigtrain.errors import UserError
    from bigtrain.starting import allowed_for
    from launchers.local import run
    from launchers.plan import make_plan

    changes = list(overrides or ())
    config = load(run_file, changes).config
    debug = bool(context.find_root().params["debug"])
    plan = make_plan(config, Path(run_file), changes, nproc=nproc, debug=debug)
    runs.check_free(config.run.dir, config.run.name, allowed_for(config))
    folder = Path(config.run.dir)
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    attempt = runs.claim(config.run.dir, config.run.name)
    try:
        code = run(plan, attempt)
    finally:
        runs.give_back(attempt)
    if code == UserError.exit_code:  # nothing has begun: nothing stays
        runs.release(attempt)
        for place in absent:
            with suppress(OSError):  # somebody else put something there
                place.rmdir()
    raise typer.Exit(code)
