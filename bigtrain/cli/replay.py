"""`bigtrain replay`: steps of a run again, for a debugger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli.report import Folder, RunName


def replay(
    run: RunName,
    step: Annotated[int, typer.Option(min=1, help="The last step that is taken again.")],
    folder: Folder = Path("runs"),
    detect_anomaly: Annotated[
        bool, typer.Option("--detect-anomaly", help="Let autograd name the operation whose gradient is not a number.")
    ] = False,
    stop_before: Annotated[bool, typer.Option("--break", help="Call breakpoint() before that step.")] = False,
) -> None:
    """Take steps of a run again, from its last checkpoint before them, with their exact samples.

    Nothing is written. In a debugger: python -m pdb -m bigtrain replay RUN --step N.
    """
    from bigtrain.replaying import replay as again
    from bigtrain.tracking.reading import find_run

    again(find_run(run, folder), step, typer.echo, detect_anomaly=detect_anomaly, stop_before=stop_before)
