"""What a test may not leave behind: processes, listening ports, files in shared memory.

Processes are known by a word in the environment that everything a session starts inherits, however far from it.
Several sessions may run on one machine: what a living process of another one holds is not ours.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MARK = "BIGTRAIN_TEST_SESSION"
# A worker of pytest-xdist is a session of its own: what another one has started is not its own.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if not os.environ.get(MARK, "").endswith(f"-{_WORKER}"):
    os.environ[MARK] = f"{uuid.uuid4().hex}-{_WORKER}"

# Servers that a session keeps on purpose: they end with it.
_KEPT = (
    "multiprocessing.forkserver",
    "multiprocessing.resource_tracker",
    "compile_worker",
    "wandb-core",
    "slurmscriptd",
)
_DAEMONS = ("munged", "slurmctld", "slurmd")
_PORTS_OF_CACHES = 5
_PORT_OF_NCCL = 28028  # at which it answers questions about itself (RAS), from the first group to the process's end
_SHARED_MEMORY = Path("/dev/shm")


def _processes() -> dict[int, str]:
    """Ours, by number, but for this one and what is above it."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    mark = f"{MARK}={os.environ[MARK]}".encode()
    above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in above:
            continue
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            is_ours = int(entry.name) in mine or mark in (entry / "environ").read_bytes()
            if is_ours and words and not _is_kept(words):  # without words it is dead already
                found[int(entry.name)] = words
    return found


def _is_kept(words: str) -> bool:
    return any(name in words for name in _KEPT) or Path(words.split()[0]).name in _DAEMONS


def _ports() -> set[int]:
    """Those that this process listens on.

    torch's and DeepSpeed's caches keep the last groups, and with them gloo's threads and ports, until the next ones
    come: measured over many trainings in one process, never more than five. So it is their number that may not grow.
    """
    held = psutil.Process().net_connections(kind="inet")
    listening = {connection.laddr.port for connection in held if connection.status == psutil.CONN_LISTEN}
    return listening - {_PORT_OF_NCCL}


def _files() -> set[str]:
    """Shared memory by name; Python's own tracker, and joblib's, take their semaphores away when the session ends."""
    with suppress(OSError):
        return {name for name in os.listdir(_SHARED_MEMORY) if not name.startswith(("sem.mp-", "sem.loky-"))}
    return set()


def _without_those_in_use(names: set[str]) -> set[str]:
    """Files that no living process has mapped or open."""
    in_use = ""
    for entry in Path("/proc").iterdir() if names else ():
        if entry.name.isdecimal():
            with suppress(OSError):
                in_use += (entry / "maps").read_text()
                in_use += " ".join(os.readlink(file) for file in (entry / "fd").iterdir())
    return {name for name in names if f"{_SHARED_MEMORY}/{name}" not in in_use}


@contextmanager
def nothing_left(patience_s: float = 10.0) -> Iterator[None]:
    """Fail where something is left that was not there before, and does not go away in a moment.

    Raises:
        AssertionError: Naming what is left.
    """
    processes, ports, files = _processes(), _ports(), _files()
    yield
    deadline = time.monotonic() + patience_s
    while True:
        gc.collect()  # an error that a test caught holds on to whatever its frames held
        left = {
            "processes": {pid: words for pid, words in _processes().items() if pid not in processes},
            "listening ports": new if len(new := _ports() - ports) > _PORTS_OF_CACHES else set(),
            "files in shared memory": _without_those_in_use(_files() - files),
        }
        if not any(left.values()):
            return
        assert time.monotonic() < deadline, f"left behind: { ({name: what for name, what in left.items() if what}) }"
        time.sleep(0.1)
