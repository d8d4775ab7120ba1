"""A run that makes no progress: every rank's stacks, who is behind, and in what it stands."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.beats import DATA, STACKS_SIGNAL
from launchers.causes import Cause
from launchers.guarded import stacks_of
from launchers.starting import Ranks
from launchers.watching import Hang, Seen

# How long ranks get to write their stacks; those that have been stopped are woken up for it.
_STACKS_S = 2.0
_SETTLED_S = 0.2

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>\S+)')
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_AGREEMENT = "bigtrain/health/agreement.py"
_READING = "bigtrain/data/"
_PACKAGES = Path(__file__).parents[1]
_LIBRARY = ("/site-packages/", "/lib/python", f"{_PACKAGES}/bigtrain/", f"{_PACKAGES}/launchers/", "<frozen")

# What the launcher exits with where a hang was the end of it; as the command timeout does.
HANG_CODE = 124


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands.

    Attributes:
        text: In words.
        is_waiting: Whether it waits there for other ranks.
    """

    text: str
    is_waiting: bool


def explain(hang: Hang, ranks: Ranks, attempt: Path, step: int | None) -> Cause:
    """Have every rank write its stacks, and say who is behind.

    Args:
        hang: What is known.
        ranks: The ranks, which are still there.
        attempt: Where the stacks go.
        step: How many steps have been taken.
    """
    stopped = {seen.rank for seen in hang.ranks if _is_stopped(seen)}
    _collect_stacks(ranks, [stacks_of(attempt, seen.rank) for seen in hang.ranks])
    hushed = stopped | {seen.rank for seen in hang.silent()}
    places = {
        seen.rank: _place(stacks_of(attempt, seen.rank), None if seen.rank in hushed else seen) for seen in hang.ranks
    }
    behind = _behind(hang, places, stopped)
    when = "the first step did not come" if hang.is_start else f"no progress after step {step}"
    lines = [f"error: {when}: nothing was heard of for {hang.waited_s:.0f} s"]
    for seen in sorted(hang.ranks, key=lambda seen: (seen.rank not in behind, seen.rank))[:8]:
        waits = "waits for it" if behind else "waits"
        word = "is behind" if seen.rank in behind else waits if places[seen.rank].is_waiting else "is"
        lines.append(f"  rank {seen.rank} {word}: {_state(seen, hang, stopped, places[seen.rank])}")
    look = "see what that rank does there; if it is right to take so long"
    if not behind:
        look = "see whether all ranks make the same collectives in the same order; if it is right to take so long"
    lines += [
        f"  at: the stacks of all ranks are in {attempt / 'stacks'}",
        f"  do: {look}, set health.{_key(hang)} higher",
    ]
    first = min(behind, default=None)
    brief = f"rank {first} hung" if first is not None else "all ranks hung"
    if first is not None:
        brief += f": {_state(next(s for s in hang.ranks if s.rank == first), hang, stopped, places[first])}"
    return Cause("\n".join(lines), brief, HANG_CODE, may_pass=True, rank=first, step=step)


def _key(hang: Hang) -> str:
    return "startup_timeout_s" if hang.is_start else "hang_timeout_s"


def _behind(hang: Hang, places: dict[int, Place], stopped: set[int]) -> set[int]:
    """The ranks that the others wait for, by the best evidence there is; empty where nothing tells them apart."""
    everyone = {seen.rank for seen in hang.ranks}
    silent = stopped | {seen.rank for seen in hang.silent()} | {seen.rank for seen in hang.ranks if seen.beat is None}
    spoken = [(seen.rank, seen.beat) for seen in hang.ranks if seen.beat is not None]
    evidence = [silent]
    for measure in (lambda beat: (beat.step, beat.batches), lambda beat: beat.collectives):
        least = min((measure(beat) for _, beat in spoken), default=None)
        evidence.append({rank for rank, beat in spoken if measure(beat) == least})
    # A rank that waits for others is not the one they wait for.
    evidence.insert(1, {rank for rank, place in places.items() if not place.is_waiting})
    return next((found for found in evidence if found and found != everyone), set())


def _state(seen: Seen, hang: Hang, stopped: set[int], place: Place) -> str:
    if seen.beat is None:
        return f"never spoke; {place.text}"
    silence = hang.at - seen.heard_at
    if seen.rank in stopped:
        return f"stopped by a signal (its process {seen.beat.pid} is in state T); {place.text}"
    if seen in hang.silent():
        return f"silent for {silence:.0f} s: stopped, or native code keeps the interpreter's lock; {place.text}"
    return f"{place.text} ({seen.beat.phase}, step {seen.beat.step + 1})"


def _is_stopped(seen: Seen) -> bool:
    """Whether a process on this machine has been stopped, as SIGSTOP does."""
    if seen.beat is None or seen.beat.host != socket.gethostname():
        return False
    try:
        return Path(f"/proc/{seen.beat.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _collect_stacks(ranks: Ranks, files: Sequence[Path]) -> None:
    ranks.signal(STACKS_SIGNAL)
    ranks.signal(signal.SIGCONT)  # one that was stopped acts on the first when it goes on
    deadline = time.monotonic() + _STACKS_S
    while time.monotonic() < deadline:
        if all(path.exists() and path.stat().st_size for path in files):
            time.sleep(_SETTLED_S)  # the last of them may be writing
            return
        time.sleep(0.05)


def _place(stacks: Path, seen: Seen | None) -> Place:
    """Where a rank stands; what one that is silent said last may be over."""
    try:
        text = stacks.read_text(errors="replace")
    except OSError:
        text = ""
    return read_place(text, seen.beat.phase if seen and seen.beat else "")


def read_place(stacks: str, phase: str) -> Place:
    """Where the main thread stands, by what faulthandler wrote.

    Args:
        stacks: The file; the main thread is its last one.
        phase: What the rank said that it was doing.
    """
    blocks = re.split(r"^(?:Current thread|Thread) 0x.*$", stacks, flags=re.MULTILINE)
    frames = [match.groupdict() for match in _FRAME.finditer(blocks[-1])]
    if not frames:
        return Place("no stack could be had", is_waiting=False)
    user = next((frame for frame in frames if not any(part in frame["file"] for part in _LIBRARY)), None)
    called = f", called from {_at(user)}" if user else ""
    collective = [frame for frame in frames if frame["file"].endswith(_COLLECTIVES)]
    if collective and not any("/torch/" not in frame["file"] for frame in frames[: frames.index(collective[0])]):
        names = [frame["function"] for frame in collective if frame["function"] not in ("wrapper", "inner", "_wait")]
        return Place(f"in the collective {names[-1] if names else collective[0]['function']}{called}", is_waiting=True)
    if frames[0]["file"].endswith(_AGREEMENT):
        return Place("in the collective by which ranks agree at the end of a step", is_waiting=True)
    if frames[0]["function"] == "_engine_run_backward":
        return Place(f"in the backward pass, with the collectives of its gradients{called}", is_waiting=True)
    inner = next((frame for frame in frames if _READING in frame["file"]), None)
    if phase == DATA or inner is not None:
        return Place(f"waiting for data at {_at(user or inner or frames[0])}", is_waiting=False)
    return Place(f"at {_at(user or frames[0])}", is_waiting=False)


def _at(frame: dict[str, str]) -> str:
    parts = Path(frame["file"]).parts
    return f"{'/'.join(parts[-2:])}:{frame['line']} in {frame['function']}"
