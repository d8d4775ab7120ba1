"""`bigtrain launch`: start a run in several processes, here or on a cluster, and keep it going."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli.config import Overrides, RunFile
from bigtrain.cli.train import NumProcesses

if TYPE_CHECKING:
    from bigtrain.config.schema import Config
    from launchers.plan import LaunchPlan


def launch(
    context: typer.Context,
    run_file: RunFile,
    overrides: Overrides = None,
    target: Annotated[
        str | None, typer.Option("--target", help="local or slurm, instead of launch.target.", metavar="WHERE")
    ] = None,
    nproc: NumProcesses = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes, instead of launch.nodes.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="The cluster's profile, instead of launch.profile.", metavar="NAME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started or submitted.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once, and leave it running.")] = False,
    in_allocation: Annotated[
        bool, typer.Option("--in-allocation", help="Start in the cluster's allocation that this command runs in.")
    ] = False,
) -> None:
    """Start the run in several processes, and start it again where that can help.

    On this machine through torchrun; on a cluster as a job, whose log is then followed.
    """
    from bigtrain.config.loader import check
    from launchers.plan import make_plan

    options = {"target": target, "nproc": nproc, "nodes": nodes, "profile": profile}
    given = [f"launch.{name}={value}" for name, value in options.items() if value is not None]
    changes = [*(overrides or ()), *given]
    config = check(run_file, changes, launched=True).config
    debug = bool(context.find_root().params["debug"])
    if config.launch.target == "slurm":
        raise typer.Exit(_cluster(config, run_file, changes, debug, dry_run, detach, in_allocation))
    plan = make_plan(config, Path(run_file), changes, debug=debug)
    if dry_run:
        from launchers.local import LocalStarter

        typer.echo(LocalStarter(plan).shown())
    elif detach:
        _leave_running(config, run_file, changes)
    else:
        raise typer.Exit(_here(config, plan))


def _here(config: Config, plan: LaunchPlan) -> int:
    """Start it on this machine; where a user's error keeps it from beginning, nothing stays."""
    from contextlib import suppress

    from bigtrain import runs
    from bigtrain.errors import UserError
    from bigtrain.starting import allowed_for
    from launchers.local import LocalStarter
    from launchers.queue import check_no_job
    from launchers.supervise import Supervisor

    folder, name = Path(config.run.dir), config.run.name
    runs.check_free(folder, name, allowed_for(config))
    check_no_job(folder / name)
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    claimed: list[Path] = []

    def claim() -> Path:
        claimed.append(runs.claim(folder, name))
        return claimed[-1]

    code = Supervisor(plan, LocalStarter(plan), claim).run()
    if code == UserError.exit_code:
        runs.release(claimed[-1])
        for place in absent:
            with suppress(OSError):  # somebody else put something there
                place.rmdir()
    return code


def _leave_running(config: Config, run_file: Path, changes: list[str]) -> None:
    """Start the launcher itself in the background, and say how to follow it."""
    import subprocess
    import sys
    import tempfile

    from bigtrain import runs
    from bigtrain.starting import allowed_for
    from launchers.queue import check_no_job, useful_commands

    path = Path(config.run.dir, config.run.name)
    runs.check_free(config.run.dir, config.run.name, allowed_for(config))
    check_no_job(path)
    log = Path(tempfile.mkstemp(prefix=f"bigtrain-{config.run.name}-", suffix=".log")[1])
    command = [sys.executable, "-m", "bigtrain", "launch", str(run_file), *changes]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    typer.echo(f"started as process {process.pid}; what it says goes to {log}\n{useful_commands(path)}")


def _cluster(
    config: Config, run_file: Path, changes: list[str], debug: bool, dry_run: bool, detach: bool, in_allocation: bool
) -> int:
    """Submit it, or start it in the allocation that this command runs in."""
    from launchers.allocate import prepared, start_here, submit_run
    from launchers.follow import follow

    prepared_run = prepared(config, Path(run_file), debug=debug)
    if in_allocation:
        return start_here(prepared_run, Path(run_file), changes)
    if dry_run:
        typer.echo(prepared_run.submission().text(), nl=False)
        typer.echo(prepared_run.submission().words(), err=True)
        return 0
    job = submit_run(prepared_run, typer.echo)
    return 0 if detach else follow(Path(config.run.dir, config.run.name), typer.echo, job=job)
