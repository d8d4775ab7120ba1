"""Who owns a run folder now: one start of the run, which renews its lease while it lives.

The lease is the file `lease` in the run folder. It says which attempt owns the run, and which process on which machine
stands for it. Attempts are numbered by making their folders, which only one process can do, and the highest number
owns the run: a forgotten writer of an earlier attempt sees so before it commits a checkpoint. Whether the process is
alive is looked up on the same machine; from another machine, a lease that was not renewed for a while has lapsed.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

LEASE = "lease"

# A lease that another machine holds has lapsed when it was not renewed for so long, some renewals being missed.
LAPSES_AFTER_S = 120.0
_RENEW_EVERY_S = 20.0
_CLAIMED_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Lease:
    """Who owns a run.

    Attributes:
        attempt: Which start of the run.
        pid: The process that stands for it.
        born: When that process started, in the system's ticks, so that a reused number is not taken for it; None where
            the system does not say.
        host: Its machine.
        owner: What it is part of (a cluster's job, say): a new start of the same owner takes the run over.
        has_ended: Whether it gave the run back.
        folder: The run folder that it owns.
    """

    attempt: int
    pid: int
    born: int | None
    host: str
    owner: str | None = None
    has_ended: bool = False
    folder: str | None = None


def take(folder: Path, attempt: int, owner: str | None = None) -> None:
    """Make this process stand for an attempt; what W&B knows the run by that this folder was copied from, is that's."""
    if _is_copy(folder, read(folder)):
        (folder / "wandb_id").unlink(missing_ok=True)
    mine = Lease(attempt, os.getpid(), _born(os.getpid()), socket.gethostname(), owner, folder=str(folder.resolve()))
    _write(folder, mine)


def _write(folder: Path, lease: Lease) -> None:
    aside = folder / f".{LEASE}.{os.getpid()}.{threading.get_ident()}"
    try:
        aside.write_text(json.dumps(asdict(lease)) + "\n", encoding="utf-8")
        os.replace(aside, folder / LEASE)
    except OSError:  # what is left of it would make a folder that holds no run look taken
        with suppress(OSError):
            aside.unlink()
        raise


def read(folder: Path) -> Lease | None:
    """The lease of a run; None where there is none."""
    try:
        return Lease(**json.loads((folder / LEASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def drop(folder: Path, attempt: int) -> None:
    """Give the run back, if this attempt still owns it."""
    lease = read(folder)
    if lease is None or lease.attempt != attempt:
        return
    ended = replace(lease, has_ended=True)
    try:
        _write(folder, ended)
    except OSError:  # a full disk: in place it is as long as it was, and needs no room
        with suppress(OSError), (folder / LEASE).open("r+", encoding="utf-8") as file:
            file.write(json.dumps(asdict(ended)) + " \n")


def await_claim(folder: Path, attempt: int) -> None:
    """Wait a moment for an attempt whose folder has been made, and whose lease is about to be written."""
    deadline = time.monotonic() + _CLAIMED_WITHIN_S
    while time.monotonic() < deadline:
        lease = read(folder)
        if lease is not None and lease.attempt >= attempt:
            return
        time.sleep(0.01)


def live_holder(folder: Path, owner: str | None = None) -> str | None:
    """Who owns a run and is alive, in words; None where the run may be taken.

    Args:
        folder: The run folder.
        owner: What the asking process is part of; a lease of the same owner may be taken.
    """
    lease = read(folder)
    if lease is None or lease.has_ended or (owner is not None and lease.owner == owner) or _is_copy(folder, lease):
        return None
    words = f"process {lease.pid} on {lease.host}" + (f" ({lease.owner})" if lease.owner else "")
    if lease.host == socket.gethostname():
        is_alive = _runs(lease.pid) if Path("/proc/self").exists() else _answers(lease.pid)
        is_same = lease.born is None or _born(lease.pid) == lease.born
        return words if is_alive and is_same else None
    try:
        age = _clock_of(folder) - (folder / LEASE).stat().st_mtime
        if age < -_RENEW_EVERY_S:  # the clock has gone back: who lives renews it, and a dead one lapses
            with suppress(OSError):  # who may only look must not take it for dead
                os.utime(folder / LEASE)
            age = 0.0
    except OSError:
        return None
    return f"{words}, last heard of {age:.0f} s ago" if age < LAPSES_AFTER_S else None


def _is_copy(folder: Path, lease: Lease | None) -> bool:
    """Whether the folder was copied, with this lease, from that of another run, which is still there."""
    if lease is None or lease.folder is None:
        return False
    try:
        return (Path(lease.folder) / LEASE).exists() and not folder.samefile(lease.folder)
    except OSError:
        return False


def _clock_of(folder: Path) -> float:
    """The time by the clock that stamps files in a folder, which is another machine's on a network."""
    probe = folder / f".{LEASE}.clock.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def owns(folder: Path, attempt: int) -> bool:
    """Whether an attempt still owns the run."""
    lease = read(folder)
    return lease is not None and lease.attempt == attempt


@contextmanager
def renewed(folder: Path, attempt: int) -> Iterator[None]:
    """Keep the lease from lapsing while this lasts, and give the run back at the end."""
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(_RENEW_EVERY_S):
            if owns(folder, attempt):
                with suppress(OSError):
                    os.utime(folder / LEASE)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        drop(folder, attempt)


def _born(pid: int) -> int | None:
    try:
        return int(_stat(pid)[19])  # the 22nd field
    except (OSError, ValueError, IndexError):
        return None


def _runs(pid: int) -> bool:
    """Whether a process is there, and not dead with nobody who asks how it ended, as in containers without an init."""
    try:
        return _stat(pid)[0] not in ("Z", "X")  # the third field, its state
    except (OSError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    """What proc(5) says of a process from the third field on: the name before, in parentheses, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
