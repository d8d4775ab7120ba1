"""Why an attempt ended, and whether another may go better.

One rank fails first and the others fail of that: who died without a word is the cause, and after that who spoke first.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import UserError
from bigtrain.failures import RankFailure, read_errors
from launchers.starting import RankEnd

_TAIL = 1 << 16  # characters of a log in which a library's last words are looked for


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an attempt failed.

    Attributes:
        text: What is told, the cause last.
        brief: The same in one line.
        exit_code: What the launcher ends with.
        may_pass: Whether another start may go well: a dead or hanging process, not an error in code.
        rank: Who failed first, if it is known.
        step: How many steps it had taken, if it is known.
    """

    text: str
    brief: str
    exit_code: int
    may_pass: bool
    rank: int | None = None
    step: int | None = None
    is_error: bool = False

    def is_same(self, other: Cause | None) -> bool:
        """Whether it is the same error in the same place: then it is no accident."""
        return (
            self.is_error
            and other is not None
            and (self.brief, self.rank, self.step) == (other.brief, other.rank, other.step)
        )


def find_cause(attempt: Path, ends: Sequence[RankEnd], code: int, *, step: int | None, debug: bool) -> Cause:
    """Why the ranks of an attempt ended badly.

    Args:
        attempt: Its folder, where ranks leave word of their errors.
        ends: How their processes ended.
        code: The exit code of what had started them.
        step: How many steps had been taken, as far as the launcher knows.
        debug: Show tracebacks of errors that are the user's.
    """
    failures = read_errors(attempt)
    with_word = {failure.rank for failure in failures}
    silent = [end for end in ends if end.code < 0] or [end for end in ends if end.rank not in with_word]
    if silent:
        return _of_death(next((end for end in silent if end.code), silent[0]), attempt, step)
    if failures:
        return _of_error(failures[0], debug=debug)
    log = attempt / "logs"
    brief = f"the ranks ended with exit code {code}"
    return Cause(f"error: {brief}\n  at: {log}", brief, code if code > 0 else 1, may_pass=True, step=step)


def _of_death(end: RankEnd, attempt: Path, step: int | None) -> Cause:
    if end.code < 0:
        name = signal.Signals(-end.code).name
        words = _last_words(attempt, end.rank) if -end.code == signal.SIGABRT else ""
        said, advice, code = f"was ended by {name}{words}", _advice(-end.code, words), 128 - end.code
    elif end.code:
        said, advice, code = f"ended with exit code {end.code} and left no word", "see that rank's log", end.code
    elif not end.is_told:
        said, code = "is gone before the run was done, and left no word", 1
        advice = (
            "it ended with exit code 0, or its machine failed: look for os._exit, or an exec, in your own code and\n"
            "      the libraries that it calls"
        )
    else:
        said, code = "ended with exit code 0 before the run was done, and left no word", 1
        advice = "look for os._exit, or an exec, in your own code and the libraries that it calls"
    brief = f"rank {end.rank} {said}"
    place = "before the first step" if not step else f"after step {step}"
    text = f"error: rank {end.rank}, {place}, {said}\n  at: {attempt / 'logs'}\n  do: {advice}"
    # What the command line refuses comes before anything is written to the run folder, and would be refused again.
    is_refused = end.code == UserError.exit_code and not step
    return Cause(text, brief, code, may_pass=not is_refused, rank=end.rank, step=step)


def _last_words(attempt: Path, rank: int) -> str:
    """What a C++ library said as it ended the process; empty where it said nothing."""
    try:
        log = (attempt / "logs" / f"rank-{rank:05d}.stderr").read_text(errors="replace")[-_TAIL:]
    except OSError:
        return ""
    said = [line.partition("what():")[2].strip() for line in log.splitlines() if "what():" in line]
    return f": {said[-1]}" if said else ""


def _advice(number: int, words: str) -> str:
    if "collective mismatch" in words:
        return (
            "look for a part of the model that runs on some ranks only, or in another order: let every trained\n"
            "      parameter take part on every rank (add its output times zero), or decide for all ranks alike"
        )
    if number == signal.SIGKILL:
        return (
            "if nobody killed it, the machine ran out of memory: see the kernel's log, and lower train.micro_batch_size"
        )
    return "a library crashed in native code; see that rank's log"


def _of_error(failure: RankFailure, *, debug: bool) -> Cause:
    """An error in a few lines: one of ours without the traceback unless it is asked for, any other with it."""
    brief = f"{failure.type}: {failure.message.strip().partition(chr(10))[0]}"
    place = f"rank {failure.rank}" + (
        f", after step {failure.step}" if failure.step is not None else ", before the first step"
    )
    if failure.exit_code == 1 and failure.remedy is None:
        text = f"{failure.traceback.rstrip()}\nerror: {place}: {failure.type}: {failure.message}"
    else:
        lines = [f"error: {failure.message}", f"  at: {place}" + (f"; {failure.where}" if failure.where else "")]
        if failure.remedy:
            lines.append("  do: " + failure.remedy.replace("\n", "\n      "))
        text = "\n".join([failure.traceback.rstrip(), *lines] if debug else lines)
    may_pass = failure.may_pass and failure.exit_code != UserError.exit_code
    return Cause(text, brief, failure.exit_code, may_pass, failure.rank, failure.step, True)
