"""The launcher's ear: what ranks say of themselves, who has made no progress for too long, who is slow.

It listens on one socket, needs no thread, and decides nothing: `look` tells what is the matter, the supervisor acts.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import statistics
import time
from dataclasses import dataclass, field

from bigtrain.beats import FINISHING, STARTING, Address, Beat, read_beat

# A rank that has not spoken for this long is stopped, or holds the interpreter's lock in native code.
SILENT_S = 3.0

# Who looks less often than that has been stopped itself.
_LONGEST_DEAF_S = 5.0

# A rank is slow if even its fastest of the last steps took twice as long by itself as the others' usual one, and some
# milliseconds more: below that, it is noise.
_SLOW_FACTOR, _SLOW_MS = 2.0, 5.0
_LONGEST_BUFFER = 1 << 16


@dataclass(slots=True)
class Seen:
    """What is known of one rank.

    Attributes:
        rank: Which one.
        beat: The last that it said; None before it has spoken.
        heard_at: When that was, by this process's monotonic clock.
        progress_at: When it last had made progress.
        is_gone: Whether it has closed its connection: it has ended, or is about to.
        left: Whether it did so before anybody ended it.
    """

    rank: int
    beat: Beat | None = None
    heard_at: float = 0.0
    progress_at: float = 0.0
    is_gone: bool = False
    left: bool = False

    @property
    def is_starting(self) -> bool:
        """Whether its first step is still to come."""
        return self.beat is None or self.beat.phase == STARTING


@dataclass(frozen=True, slots=True)
class Hang:
    """No progress for too long.

    Attributes:
        ranks: What is known of each rank that has not ended.
        waited_s: How long the one that waits longest has made none.
        is_start: Whether the first step never came.
        at: When it was noticed, by the monotonic clock.
    """

    ranks: list[Seen]
    waited_s: float
    is_start: bool
    at: float

    def silent(self) -> list[Seen]:
        """Ranks that have spoken, and do so no more."""
        return [seen for seen in self.ranks if seen.beat is not None and self.at - seen.heard_at > SILENT_S]


@dataclass(slots=True)
class _Line:
    buffer: bytearray = field(default_factory=bytearray)
    rank: int | None = None


class Watch:
    """Listens to the ranks of one attempt.

    Args:
        host: Where to listen, and the name by which ranks find it.
        world_size: How many ranks there will be.
        hang_timeout_s: How long a rank may make no progress; None: for ever.
        startup_timeout_s: How long everything up to the first step may take; None: for ever.
    """

    def __init__(
        self, host: str, world_size: int, *, hang_timeout_s: float | None, startup_timeout_s: float | None
    ) -> None:
        self._hang_s, self._startup_s = hang_timeout_s, startup_timeout_s
        self._began = self._looked_at = time.monotonic()
        self._ranks = [Seen(rank, progress_at=self._began) for rank in range(world_size)]
        self._told_slow: dict[int, float] = {}
        self._is_ending = False
        self._listener = socket.create_server((host, 0), backlog=max(128, world_size))
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    @property
    def step(self) -> int | None:
        """How many steps have been taken, as far as is known."""
        steps = [seen.beat.step for seen in self._ranks if seen.beat is not None]
        return max(steps, default=None)

    def pids(self) -> dict[int, tuple[str, int]]:
        """The machine and process of every rank that has spoken."""
        return {seen.rank: (seen.beat.host, seen.beat.pid) for seen in self._ranks if seen.beat is not None}

    def left_early(self) -> set[int]:
        """The ranks that have not said that they come to their end; all that was said is heard before."""
        while ready := self._selector.select(0):
            for key, _ in ready:
                self._hear(key)
        return {seen.rank for seen in self._ranks if seen.beat is None or seen.beat.phase != FINISHING}

    def left_by_themselves(self) -> set[int]:
        """The ranks that have closed their connection before they were ended."""
        return {seen.rank for seen in self._ranks if seen.left}

    def note_ending(self) -> None:
        """Note that ranks are being ended: who is gone from now on has not left by itself."""
        self._is_ending = True

    def has_begun(self) -> bool:
        """Whether any rank has taken its first step in this attempt."""
        return any(not seen.is_starting for seen in self._ranks)

    def listen(self, timeout_s: float) -> None:
        """Hear what ranks say, for at most this long."""
        deadline = time.monotonic() + timeout_s
        while True:
            for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
                self._hear(key)
            if time.monotonic() >= deadline:
                return

    def look(self) -> Hang | None:
        """Whether a rank has made no progress for too long."""
        now = time.monotonic()
        self._leave_out_own_stop(now)
        there = [seen for seen in self._ranks if not seen.is_gone]
        waited = {seen.rank: now - (self._began if seen.is_starting else seen.progress_at) for seen in there}
        late = [seen for seen in there if (limit := self._limit(seen)) is not None and waited[seen.rank] > limit]
        if not late:
            return None
        return Hang(there, max(waited[seen.rank] for seen in late), all(seen.is_starting for seen in late), now)

    def _leave_out_own_stop(self, now: float) -> None:
        """Start no clock while this process was stopped, by Ctrl-Z or with its container: it has heard nobody then."""
        stopped_s, self._looked_at = now - self._looked_at, now
        if stopped_s > _LONGEST_DEAF_S:
            self._began += stopped_s
            for seen in self._ranks:
                seen.progress_at = min(now, seen.progress_at + stopped_s)

    def slow(self) -> list[tuple[Seen, float]]:
        """Ranks newly found to be slow, or slower by half again, each with the milliseconds of the others."""
        spoken = [seen for seen in self._ranks if seen.beat is not None and seen.beat.own_ms > 0 and not seen.is_gone]
        found = []
        for seen in spoken:
            assert seen.beat is not None
            others = [other.beat.own_ms for other in spoken if other is not seen and other.beat is not None]
            if not others:
                continue
            usual, own = statistics.median(others), seen.beat.least_own_ms
            if own > _SLOW_FACTOR * usual + _SLOW_MS and own > 1.5 * self._told_slow.get(seen.rank, 0.0):
                self._told_slow[seen.rank] = own
                found.append((seen, usual))
        return found

    def _limit(self, seen: Seen) -> float | None:
        return self._startup_s if seen.is_starting else self._hang_s

    def _hear(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        else:
            self._read(key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Line())

    def _read(self, connection: socket.socket, line: _Line) -> None:
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        line.buffer += data
        *whole, rest = bytes(line.buffer).split(b"\n")
        is_ours = all(self._take(read_beat(part), line) for part in whole)
        line.buffer = bytearray(rest)
        if not data or not is_ours or len(rest) > _LONGEST_BUFFER:
            self._selector.unregister(connection)
            connection.close()
            if line.rank is not None:
                self._ranks[line.rank].is_gone = True
                self._ranks[line.rank].left = not self._is_ending

    def _take(self, beat: Beat | None, line: _Line) -> bool:
        """Note what a rank said; False where nobody of ours did."""
        if beat is None or not secrets.compare_digest(beat.token.encode(), self.address.token.encode()):
            return False
        if not 0 <= beat.rank < len(self._ranks):
            return False
        line.rank = beat.rank
        seen, now = self._ranks[beat.rank], time.monotonic()
        if seen.beat is None or (beat.count, beat.phase == STARTING) != (seen.beat.count, seen.beat.phase == STARTING):
            seen.progress_at = now
        seen.beat, seen.heard_at = beat, now
        return True
