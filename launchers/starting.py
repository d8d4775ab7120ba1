"""What a supervisor needs of whatever starts ranks: torchrun on this machine, `srun` in an allocation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from re import Pattern
from typing import IO, Protocol


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank's process ended badly.

    Attributes:
        rank: Which one.
        code: Its exit code; -N where signal N ended it; 0 where it left before its time.
        is_told: Whether what had started it says so; else it is gone, and nothing more is known.
    """

    rank: int
    code: int
    is_told: bool = True


class Ranks(Protocol):
    """The ranks of one attempt, started."""

    def poll(self) -> int | None:
        """The exit code of all of it; None while it runs."""

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""

    def stop(self, number: int) -> None:
        """Ask every rank, once, by a signal to save and leave; call it again and again: ranks may not be there yet."""

    def kill(self) -> None:
        """End every rank and everything around them, at once."""

    def ends(self) -> list[RankEnd]:
        """How ranks ended, as far as it is known, the first one first; those with 0 may have come to the run's end."""

    def is_silent_about(self, rank: int) -> bool:
        """Whether a rank that is gone may have ended with 0, which is not told here."""

    def close(self) -> None:
        """Tidy up after the end."""


class Starter(Protocol):
    """Starts ranks."""

    def address(self) -> str:
        """The name or number of this machine by which ranks find it."""

    def start(self, attempt: Path, environment: Mapping[str, str]) -> Ranks:
        """Start the ranks of an attempt.

        Args:
            attempt: The attempt's part of the run folder.
            environment: What every rank is to find in its environment.
        """

    def close(self) -> None:
        """End what was kept from one attempt for the next."""


class Agent:
    """A process that starts the ranks and speaks of them on stderr, among what rank 0 writes there itself.

    Args:
        command: How to start it.
        environment: Its environment.
        log: Where what it says goes.
        speaks: What its own lines look like.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, *, speaks: Pattern[bytes]
    ) -> None:
        self.log = log
        self._speaks = speaks
        # A session of its own: a terminal's Ctrl-C must not reach it, nor the ranks, except through the supervisor.
        self.process = subprocess.Popen(
            command, env=dict(environment), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert self.process.stderr is not None
        self._pump = threading.Thread(target=self._pass_on, args=(self.process.stderr,), daemon=True)
        self._pump.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """Kill it and everything below it."""
        end_tree(self.process.pid)

    def close(self) -> None:
        """Wait for the last of what it says."""
        self._pump.join(timeout=2)

    def _pass_on(self, stream: IO[bytes]) -> None:
        """Copy rank 0's lines to the terminal and its log, the agent's own lines to another."""
        with stream, self.log.open("ab") as agents, self.log.with_name("rank-00000.stderr").open("ab") as ranks:
            for line in stream:
                for target in (agents,) if self._speaks.match(line) else (ranks, sys.stderr.buffer):
                    target.write(line)
                    target.flush()


def children(pid: int) -> list[int]:
    """The processes that a process started; empty where the system has no /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def name_of(pid: int) -> str:
    """What lists of processes call a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def command_of(pid: int) -> bytes:
    """The command line of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def end_tree(pid: int) -> None:
    """Kill a process and everything below it: it first, so that it starts nothing new."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for child in children(pid):
        end_tree(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def remove_empty(folder: Path) -> None:
    """Take away files of a folder that nothing was written to, and the folder where nothing is left."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
    with suppress(OSError):
        folder.rmdir()
