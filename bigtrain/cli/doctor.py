"""`bigtrain doctor`: is this machine fit?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="The folder of all runs.", metavar="FOLDER")] = Path("runs"),
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Processes that are to run here.")] = None,
) -> None:
    """Look at this machine and say what to do: packages, GPUs, cores, limits, disk, cluster, a real all-reduce.

    Exit code 0: fit; 1: it will do, with warnings; 2: it will fail.
    """
    import json
    import warnings
    from dataclasses import asdict

    from bigtrain.config.schema import Engine
    from bigtrain.doctor import ERROR, WARNING, Finding, examine
    from launchers.cluster_check import check_cluster
    from launchers.plan import count_gpus_of

    warnings.simplefilter("ignore")  # torch warns of drivers while it looks for GPUs: that is told below
    count = nproc or count_gpus_of(Engine()) or 2
    findings = [*(Finding(*found) for found in check_cluster()), *examine(folder, count)]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.level:<8} {finding.what}: {finding.text}")
            if finding.remedy:
                typer.echo(f"{'':<8} do: {finding.remedy}")
    levels = {finding.level for finding in findings}
    raise typer.Exit(2 if ERROR in levels else 1 if WARNING in levels else 0)
