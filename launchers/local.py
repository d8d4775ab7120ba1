"""Ranks on this machine, through torchrun's agent: rank 0 on the terminal, a log for each of the others.

The agent starts them and ends them all when one fails; it restarts nothing. That is the supervisor's.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from launchers.guarded import END_OF_ATTEMPT, PRELOAD_VARIABLE, RANK_NAME
from launchers.plan import LaunchPlan, interpreter
from launchers.scratch import Scratch
from launchers.starting import RankEnd, Ranks, children, command_of, end_tree, name_of
from launchers.supervise import is_finished

# After the first rank has failed, the agent asks the others to end. They are killed after this long.
_GRACE_SECONDS = 2.0
# Of a rank that left with 0, and not by Python's own end, the agent would wait for its word for ever.
_NO_WORD_S = 5.0
# How long the last lines of an attempt may take to come through.
_LAST_LINES_S = 2.0


class LocalStarter:
    """Starts the processes of a plan on this machine."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self._agent: _Agent | None = None

    def address(self) -> str:
        """Loopback: nobody else has to find it."""
        return "127.0.0.1"

    def shown(self) -> str:
        """What starts the same ranks by hand, once."""
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(self._plan.environment.items())]
        torchrun = ["torchrun", "--standalone", f"--nproc-per-node={self._plan.nproc}", "-m", *self._plan.program]
        return " ".join([*words, shlex.join(torchrun)])

    def start(self, attempt: Path, environment: Mapping[str, str]) -> Ranks:
        """Have the agent start the ranks; see `Starter`."""
        if self._agent is None or not self._agent.is_idle():
            self.close()
            self._agent = _Agent(self._plan)
        return _LocalRanks(self._agent, self._plan, attempt, environment)

    def close(self) -> None:
        """End the agent."""
        if self._agent is not None:
            self._agent.close()


class _LocalRanks:
    def __init__(self, agent: _Agent, plan: LaunchPlan, attempt: Path, environment: Mapping[str, str]) -> None:
        self._agent, self._attempt = agent, attempt
        self._asked: set[int] = set()
        self._seen: set[int] = set()
        self._killed: set[int | None] = set()
        self._gone_at: float | None = None
        self._all_gone_at: float | None = None
        job = {
            "nproc": plan.nproc,
            "program": plan.program,
            "environment": dict(environment),
            "log": str(attempt / "logs" / "torchrun.log"),
        }
        agent.begin(job, attempt / "logs" / "rank-00000.stderr")

    def poll(self) -> int | None:
        code = self._agent.poll()
        if code is not None:
            return code
        alive = set(self._agent.ranks())
        self._end_those_left(alive)
        return self._end_where_none_is_left(alive)

    def signal(self, number: int) -> None:
        # The agent itself must not see it: it would give the ranks a few seconds and call it a failure.
        for rank in self._agent.ranks():
            with suppress(ProcessLookupError):
                os.kill(rank, number)

    def stop(self, number: int) -> None:
        for rank in set(self._agent.ranks()) - self._asked:
            self._asked.add(rank)
            with suppress(ProcessLookupError):
                os.kill(rank, number)

    def kill(self) -> None:
        if not self._agent.is_idle():
            self._agent.kill()

    def ends(self) -> list[RankEnd]:
        # With the two signals the agent ends the others.
        ended = [end for end in self._agent.ends() if end.code not in (-signal.SIGTERM, -signal.SIGINT)]
        return [end for end in ended if not (end.rank in self._killed and end.code == -signal.SIGKILL)]

    def is_silent_about(self, rank: int) -> bool:
        return False  # the agent tells of every rank

    def close(self) -> None:
        self._agent.wait_for_last_lines()

    def _end_where_none_is_left(self, alive: set[int]) -> int | None:
        """0 some time after all are gone, and nothing was wrong that the agent would have told."""
        if alive or not self._seen:
            self._all_gone_at = None
            return None
        now = time.monotonic()
        self._all_gone_at = self._all_gone_at or now
        if now - self._all_gone_at < _NO_WORD_S:
            return None
        self._agent.kill()
        return 0

    def _end_those_left(self, alive: set[int]) -> None:
        """Kill the others some time after a rank is gone: the agent alone would wait for them for half a minute."""
        self._seen |= alive
        if self._gone_at is None and self._seen - alive and not is_finished(self._attempt):
            self._gone_at = time.monotonic()
        if self._gone_at is not None and time.monotonic() - self._gone_at > _GRACE_SECONDS:
            # The agent did not ask them to end, which it does not where the one that is gone ended with 0.
            self._killed |= {_rank_of(process) for process in alive}
            self.signal(signal.SIGKILL)


class _Agent:
    """The process of `launchers.agent`, and what is said to it and by it."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._scratch = Scratch()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [interpreter(), "-m", "launchers.guarded", "launchers.agent", str(theirs.fileno()), self._scratch.path],
            env={**inherited, **plan.environment, "PYTHONUNBUFFERED": "1", PRELOAD_VARIABLE: ",".join(plan.preload)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A session of its own: a terminal's Ctrl-C must not reach it, nor the ranks, except through the supervisor.
            start_new_session=True,
        )
        theirs.close()
        self._said = b""
        self._answer: dict[str, object] | None = {}
        self._log: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._is_through = threading.Event()
        assert self._process.stderr is not None
        threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True).start()

    def begin(self, job: Mapping[str, object], log: Path) -> None:
        """Start an attempt; what its rank 0 writes to stderr goes to the terminal and to a log."""
        self._answer = None
        self._is_through.clear()
        with self._lock:
            self._log = log.open("ab")
        with suppress(OSError):  # it is gone, as `poll` will tell
            self._socket.sendall(json.dumps(job).encode() + b"\n")

    def is_idle(self) -> bool:
        """Whether it is there and no attempt is under way."""
        self._listen()
        return self._answer is not None and self._process.poll() is None

    def poll(self) -> int | None:
        """The exit code of the attempt; None while it runs."""
        self._listen()
        if self._answer is None:
            return self._process.poll()
        return int(str(self._answer["code"]))

    def ends(self) -> list[RankEnd]:
        """How ranks ended by themselves, by what the agent says when all of them have ended."""
        self._listen()
        ends = (self._answer or {}).get("ends", [])
        return [RankEnd(rank, code) for rank, code in ends]  # type: ignore[attr-defined]

    def ranks(self) -> list[int]:
        """Their processes: those that the agent's server has forked, but for what an import starts for a moment."""
        forked = [process for child in children(self._process.pid) for process in children(child)]
        return [process for process in forked if name_of(process).startswith(RANK_NAME)]

    def kill(self) -> None:
        """Kill it and everything below it, but for Python's tracker, which ends when it has tidied up after them."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            for child in children(self._process.pid):
                if b"resource_tracker" not in command_of(child):
                    end_tree(child)
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, and leave nothing behind."""
        self.kill()
        self._socket.close()
        self._scratch.close()

    def wait_for_last_lines(self) -> None:
        """Wait until everything that the ranks of the attempt wrote has come through."""
        self._is_through.wait(_LAST_LINES_S)
        with self._lock:
            if self._log is not None:
                self._log.close()
            self._log = None

    def _listen(self) -> None:
        with suppress(OSError):
            self._said += self._socket.recv(1 << 16)
        line, newline, rest = self._said.partition(b"\n")
        if newline:
            self._answer, self._said = json.loads(line), rest

    def _pass_on(self, stream: IO[bytes]) -> None:
        """Pass on what ranks write as it comes: a bar of progress has no newline."""
        kept = b""
        with stream:
            while data := os.read(stream.fileno(), 1 << 16):
                text, mark, rest = (kept + data).partition(END_OF_ATTEMPT)
                kept = rest if mark else _begun(text, END_OF_ATTEMPT)
                self._write(text if mark else text.removesuffix(kept))
                if mark:
                    self._is_through.set()
        self._write(kept)
        self._is_through.set()

    def _write(self, text: bytes) -> None:
        # A terminal that is gone or a full disk must not keep ranks waiting for somebody who reads.
        with suppress(OSError, ValueError):
            sys.stderr.buffer.write(text)
            sys.stderr.buffer.flush()
        with self._lock, suppress(OSError):
            if self._log is not None:
                self._log.write(text)
                self._log.flush()


def _rank_of(process: int) -> int | None:
    """Which rank a process is; None where it is none, or gone."""
    number = name_of(process).removeprefix(RANK_NAME)
    return int(number) if number.isdigit() else None


def _begun(text: bytes, mark: bytes) -> bytes:
    """What a text ends with that may be the beginning of a mark."""
    return next((mark[:size] for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), b"")
