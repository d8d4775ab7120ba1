"""`bigtrain try`: will it work?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bigtrain.cli.config import Overrides, RunFile
from bigtrain.cli.train import NumProcesses, leave, leave_at_once

if TYPE_CHECKING:
    from bigtrain.rehearsal import Rehearsal


def try_run(
    context: typer.Context,
    run_file: RunFile,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
) -> None:
    """Try the run out: two steps, an evaluation, a save, a load and the step after it, in its own processes.

    No run folder is made. Exit code 0: it will work.
    """
    import os

    from bigtrain.config.loader import check
    from bigtrain.runs import ATTEMPT_VARIABLE

    changes = list(overrides or ())
    config = check(run_file, changes).config
    if ATTEMPT_VARIABLE not in os.environ:
        raise typer.Exit(_start(context, run_file, changes, nproc))
    from bigtrain.rehearsal import rehearse
    from bigtrain.running import word_of_failure

    try:
        with word_of_failure() as failing:
            failing.rank = int(os.environ.get("RANK", 0))
            found = rehearse(config, Path(os.environ[ATTEMPT_VARIABLE]) / "checkpoints", typer.echo)
    except BaseException:
        leave_at_once()
    if failing.rank == 0:
        typer.echo(f"it will work: {found.total_steps:,} steps take about {_duration(found)}{_memory(found)}")
    leave(0)


def _start(context: typer.Context, run_file: Path, changes: list[str], nproc: int | None) -> int:
    """Start it as `bigtrain launch` would."""
    import tempfile
    from dataclasses import replace

    from bigtrain.config.loader import load
    from launchers.local import LocalStarter
    from launchers.plan import make_plan
    from launchers.supervise import Supervisor

    debug = bool(context.find_root().params["debug"])
    plan = make_plan(load(run_file, changes).config, Path(run_file), changes, nproc=nproc, debug=debug, command="try")
    plan = replace(plan, max_restarts=0, leaves_result=False)
    with tempfile.TemporaryDirectory(prefix="bigtrain-try-") as folder:
        attempt = Path(folder, "attempts", "0")
        (attempt / "logs").mkdir(parents=True)
        return Supervisor(plan, LocalStarter(plan), lambda: attempt).run()


def _duration(found: Rehearsal) -> str:
    seconds = found.total_steps * found.step_seconds
    for name, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def _memory(found: Rehearsal) -> str:
    return "" if found.peak_bytes is None else f", at most {found.peak_bytes / 2**30:.1f} GiB of each GPU"
