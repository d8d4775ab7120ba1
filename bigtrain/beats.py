"""What a rank tells the launcher that watches it: a line of JSON once in a while, over a connection of its own.

Ranks find the launcher by BIGTRAIN_WATCH. This module is all that both sides know of it; it does not import torch.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import signal
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

WATCH_VARIABLE, STEPS_VARIABLE = "BIGTRAIN_WATCH", "BIGTRAIN_STEPS"

# How often a rank speaks, in seconds: what is found out by silence takes a few of these.
INTERVAL_S = 0.5

# On this signal a rank writes the stacks of its threads. Unlike others it does nothing to who is not ready for it.
STACKS_SIGNAL = signal.SIGURG

# A rank that ends with this code is to be started again: it has saved.
AGAIN = 75

_LONGEST_LINE = 4096
_STEP = struct.Struct("<Q")

STARTING, DATA, TRAINING, EVALUATING, SAVING, FINISHING = (
    "starting",
    "waiting for data",
    "training",
    "evaluating",
    "saving",
    "finishing",
)


class Steps:
    """How many steps each rank has taken, as the launcher sees it: also of a rank that was killed without a word.

    It is memory that ranks of the same machine write to, and no file: a step never waits for a disk. Ranks find it by
    BIGTRAIN_STEPS; of those on other machines it knows nothing, and nothing at all where the system has no such memory.
    """

    def __init__(self, num_ranks: int) -> None:
        self._file, self.address = -1, ""
        if hasattr(os, "memfd_create"):
            name = f"bigtrain-{secrets.token_hex(8)}"
            self._file = os.memfd_create(name)
            os.ftruncate(self._file, num_ranks * _STEP.size)
            self.address = f"/proc/{os.getpid()}/fd/{self._file}:{name}"

    def largest(self) -> int | None:
        """The most that any rank has taken; None where none ever said."""
        if not self.address:
            return None
        taken = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return max((taken for (taken,) in _STEP.iter_unpack(taken) if taken), default=None)

    def close(self) -> None:
        """Let go of the memory."""
        if self.address:
            os.close(self._file)


def write_step(memory: mmap.mmap, rank: int, step: int) -> None:
    """Note how many steps a rank has taken, in the memory of `Steps`."""
    _STEP.pack_into(memory, rank * _STEP.size, step)


def map_steps() -> mmap.mmap | None:
    """The memory of the launcher's `Steps`; None where it has none, or is on another machine."""
    path, _, name = os.environ.get(STEPS_VARIABLE, "").rpartition(":")
    try:
        if not name or name not in os.readlink(path):  # on another machine the path may be anybody's
            return None
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Address:
    """Where the launcher listens.

    Attributes:
        host: Its name or number.
        port: Its port.
        token: What a rank says first, so that nobody else is listened to.
    """

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.token}"

    @classmethod
    def of_environment(cls) -> Address | None:
        """Where this process's launcher listens; None where nobody watches."""
        given = os.environ.get(WATCH_VARIABLE)
        if not given:
            return None
        host, port, token = given.rsplit(":", 2)
        return cls(host, int(port), token)


@dataclass(slots=True)
class Beat:
    """One message of a rank.

    Attributes:
        token: The launcher's own.
        rank: Who speaks.
        pid: Its process.
        host: Its machine.
        count: Microbatches, evaluation batches and written chunks so far: any of them is progress.
        batches: Microbatches and evaluation batches alone, of which each rank has as many.
        step: Steps taken.
        phase: What it is doing.
        collectives: How many collectives it has entered; -1 where that is not known.
        own_ms: Milliseconds of a step that it spends by itself, waiting for nobody: the middle one of the last steps.
        least_own_ms: The least of the last steps, which no chance disturbance makes longer.
    """

    token: str
    rank: int
    pid: int
    host: str
    count: int = 0
    batches: int = 0
    step: int = 0
    phase: str = STARTING
    collectives: int = -1
    own_ms: float = 0.0
    least_own_ms: float = 0.0

    def line(self) -> bytes:
        """The message as it is sent."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


_TYPES: dict[str, type | tuple[type, ...]] = {
    "token": str, "rank": int, "pid": int, "host": str, "count": int, "batches": int, "step": int, "phase": str,
    "collectives": int, "own_ms": (int, float), "least_own_ms": (int, float),
}  # fmt: skip


def read_beat(line: bytes) -> Beat | None:
    """The message in a line; None where it is none, whoever wrote it."""
    if len(line) > _LONGEST_LINE:
        return None
    try:
        held: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or held.keys() != {field.name for field in fields(Beat)}:
        return None
    if not all(isinstance(held[name], kind) for name, kind in _TYPES.items()):
        return None
    return Beat(**held)
