"""torchrun's agent, kept for all attempts of a run: `python -m launchers.guarded launchers.agent DESCRIPTOR FOLDER`.

A line of JSON on the socket with that descriptor starts an attempt, and a line comes back when it has ended. Ranks are
forked from a server that imported, once, what every rank needs: they start in a fraction of a second, also again. The
folder is for sockets and files that nobody reads.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
import uuid
from multiprocessing import forkserver, resource_tracker
from typing import Any

from launchers.forked import RankProcess, be_rank
from launchers.guarded import END_OF_ATTEMPT, PARENT_VARIABLE


def main() -> None:
    """Carry out attempts until the launcher closes the socket."""
    tempfile.tempdir = sys.argv[2]  # here only: ranks have the user's
    _start_tracker()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    forkserver.set_forkserver_preload(["launchers.preloaded"])
    forkserver.ensure_running()  # it imports while this process does
    stderr_of_ranks = os.dup(2)
    multiprocessing.get_context("forkserver").Process = RankProcess  # type: ignore[misc]
    with socket.socket(fileno=int(sys.argv[1])) as launcher, launcher.makefile("rw") as lines:
        for line in lines:
            answer = _attempt(json.loads(line))
            os.write(stderr_of_ranks, END_OF_ATTEMPT)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def _start_tracker() -> None:
    """Start what unlinks semaphores when this process is killed; that there were some is nothing to tell a user."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    resource_tracker.ensure_running()
    os.dup2(stderr, 2)
    os.close(stderr)


def _attempt(job: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of one attempt and wait: an exit code, and [rank, code] of those who ended by themselves."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch's own way to write a traceback imports its compiler first: seconds.
    for handler in logging.getLogger("torch.distributed").handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with open(job["log"], "ab") as log:
        os.dup2(log.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["nproc"],
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=sys.argv[2]),
    )
    RankProcess.begin()
    try:
        elastic_launch(config, be_rank)({"program": job["program"], "environment": job["environment"]})
    except ChildFailedError:
        return {"code": 1, "ends": RankProcess.ended()}
    except Exception:
        traceback.print_exc()
        return {"code": 1, "ends": []}
    return {"code": 0, "ends": []}


if __name__ == "__main__":
    main()
