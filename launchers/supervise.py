"""Attempts: start the ranks, watch them, say why they ended, and start them again where that can help.

The same for one process, for torchrun on this machine and for a step in an allocation. Each attempt is a fresh
rendezvous with a folder of its own; a second start in the same run folder goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from bigtrain import runs
from bigtrain.beats import AGAIN, STEPS_VARIABLE, WATCH_VARIABLE, Steps
from bigtrain.early import Wishes
from bigtrain.errors import TrainingError, UserError
from bigtrain.failures import read_errors
from bigtrain.runs import ATTEMPT_VARIABLE, give_back, read_json, write_atomically
from bigtrain.starting import word_of_early_stop
from bigtrain.terminal import leave_terminal, print_line
from launchers import hangs
from launchers.causes import Cause, find_cause
from launchers.plan import LaunchPlan
from launchers.starting import RankEnd, Ranks, Starter, remove_empty
from launchers.watching import Seen, Watch

# Once a rank has failed, the others get this long; after it, everything is ended. All is gone within ten seconds.
LIMIT_S = 6.0
# How long the ranks may take to save and leave after a second signal.
SHORT_WAIT_S = 10.0
_POLL_S = 0.1
_LONGEST_PAUSE_S = 60.0

FINISHED, STOPPED, AGAIN_LATER, REFUSED, FAILED, HUNG = (
    "finished",
    "stopped",
    "again",
    "refused",
    "failed",
    "hung",
)


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended.

    Attributes:
        outcome: finished, stopped, again, refused, failed or hung.
        code: What the launcher would exit with.
        step: The newest checkpoint's step then; -1 where there is none.
        fruitless: How often the run has failed in a row, this time included, since there was a new checkpoint.
        cause: Why, in one line; None where it went well.
        rank: Which rank failed first.
        at_step: How many steps had been taken then.
        time: When, in seconds since 1970.
    """

    outcome: str
    code: int
    step: int
    fruitless: int
    cause: str | None
    rank: int | None
    at_step: int | None
    time: float


class Supervisor:
    """Owns the attempts of one run.

    Args:
        plan: What is started.
        starter: What starts it.
        claim: Makes the next attempt's folder.
        place: What is noted of this start beside its process and machine: a job's number, say.
        again: What exit code 75 leads to: True, start again here; False, end with it, the caller does.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        starter: Starter,
        claim: Callable[[], Path],
        *,
        place: Mapping[str, str] | None = None,
        again: bool = True,
    ) -> None:
        self._plan, self._starter, self._claim = plan, starter, claim
        self._place, self._again = dict(place or {}), again
        self._interrupt = _Interrupt()
        self._last: Cause | None = None

    def run(self) -> int:
        """Start attempts until one ends well, none can help, or the launcher was asked to stop.

        Returns:
            0; the exit code of the rank that failed first; 128 + N after signal N; 75 where the caller is to start
            all of it again.
        """
        with self._interrupt, closing(self._starter):
            while True:
                attempt = self._claim()
                try:
                    end, cause = self._attempt(attempt)
                finally:
                    give_back(attempt)
                if not attempt.is_dir():
                    return _say_that_it_is_gone(attempt)
                if not self._goes_on(end, cause, attempt):
                    return end.code
                if end.outcome == AGAIN_LATER and not self._again:
                    return AGAIN
                if not self._interrupt.again:
                    self._pause(end)
                if self._interrupt.number is not None:
                    return 128 + self._interrupt.number
                if self._interrupt.again:
                    return AGAIN
                self._last = cause

    # ---- one attempt ----------

    def _attempt(self, attempt: Path) -> tuple[End, Cause | None]:
        plan = self._plan
        before = newest_step(attempt)
        note_start(attempt, {**self._place, "processes": plan.num_processes})
        with (
            closing(Steps(plan.num_processes)) as steps,
            Watch(
                self._starter.address(),
                plan.num_processes,
                hang_timeout_s=plan.hang_timeout_s,
                startup_timeout_s=plan.startup_timeout_s,
            ) as watch,
        ):
            environment = {
                **plan.environment,
                ATTEMPT_VARIABLE: str(attempt),
                WATCH_VARIABLE: str(watch.address),
                STEPS_VARIABLE: steps.address,
                "PYTHONUNBUFFERED": "1",
            }
            count = f"{plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
            print_line(f"starting {count}; logs are in {attempt / 'logs'}")
            ranks = self._starter.start(attempt, environment)
            try:
                code, hung = self._watch(ranks, watch, attempt)
                early = watch.left_early() if plan.leaves_result and not is_finished(attempt) else set()
                ends, gone = ranks.ends(), early & watch.left_by_themselves()
            finally:
                ranks.kill()
                ranks.close()
            step = max(filter(None, (steps.largest(), watch.step)), default=None)
        ends = [end for end in ends or ranks.ends() if end.code or end.rank in early]
        ends += [RankEnd(rank, 0, is_told=False) for rank in sorted(gone) if ranks.is_silent_about(rank)]
        if code == 0:  # all of them ended so
            ends = [RankEnd(rank, 0) for rank in sorted(early)]
        end, cause = self._judge(code, hung, ends, attempt, before, step)
        if attempt.is_dir():
            write_atomically(attempt / "end.json", json.dumps(asdict(end), indent=2) + "\n")
            for name in ("logs", "stacks"):
                remove_empty(attempt / name)
        return end, cause

    def _watch(self, ranks: Ranks, watch: Watch, attempt: Path) -> tuple[int, Cause | None]:
        """Wait until the ranks have ended, by themselves or because they must."""
        failed_at: float | None = None
        hung: Cause | None = None
        while (code := ranks.poll()) is None:
            watch.listen(_POLL_S)
            now = time.monotonic()
            if self._interrupt.number is not None or self._interrupt.again:
                ranks.stop(signal.SIGUSR2 if self._interrupt.number is None else signal.SIGTERM)
            if failed_at is None and (any((attempt / "errors").glob("rank-*.json")) or ranks.ends()):
                failed_at = now
            if hung is None and failed_at is None and (hang := watch.look()) is not None:
                hung = hangs.explain(hang, ranks, attempt, watch.step)
                watch.note_ending()
                ranks.kill()
            if (failed_at is not None and now - failed_at > LIMIT_S) or self._interrupt.is_over(now):
                watch.note_ending()
                ranks.kill()
            for seen, usual_ms in watch.slow():
                self._report_slow(attempt, seen, usual_ms)
        return code, hung

    def _judge(
        self, code: int, hung: Cause | None, ends: list[RankEnd], attempt: Path, before: int, step: int | None
    ) -> tuple[End, Cause | None]:
        """How an attempt ended, and why."""
        now, cause = newest_step(attempt), hung
        wants_again = code == AGAIN or any(end.code == AGAIN for end in ends)
        if code == 0 and (is_finished(attempt) or not self._plan.leaves_result):
            outcome = FINISHED
        elif hung is not None:
            outcome = HUNG
        elif self._interrupt.number is not None or (code == 0 and not ends):
            outcome = STOPPED
            if read_errors(attempt):
                cause = find_cause(attempt, ends, code, step=step, debug=self._plan.debug)
            code = 128 + (self._interrupt.number or signal.SIGTERM)
        elif wants_again:
            outcome, code = AGAIN_LATER, AGAIN
        else:
            cause = find_cause(attempt, ends, code, step=step, debug=self._plan.debug)
            outcome = REFUSED if cause.exit_code == UserError.exit_code and not cause.may_pass else FAILED
        if cause is not None and outcome != STOPPED:
            code = cause.exit_code
        fruitless = 0 if now > before else fruitless_starts(attempt)
        if outcome in (HUNG, FAILED) or (outcome == AGAIN_LATER and now <= before):
            fruitless += 1
        brief, rank, at_step = (cause.brief, cause.rank, cause.step) if cause else (None, None, step)
        return End(outcome, code, now, fruitless, brief, rank, at_step, time.time()), cause

    # ---- what follows ----------

    def _goes_on(self, end: End, cause: Cause | None, attempt: Path) -> bool:
        """Whether there is to be another attempt; where not, the cause is the last thing on the screen."""
        if end.outcome in (FINISHED, STOPPED):
            if cause is not None:
                print_line(f"\n{cause.text}", 2)
            elif end.outcome == STOPPED and (
                not end.at_step or end.step < end.at_step
            ):  # else rank 0 says what it saved
                goes_on, took_steps = self._plan.goes_on, bool(end.at_step)
                word = word_of_early_stop(attempt.parent.parent, goes_on=goes_on, took_steps=took_steps)
                print_line(word if self._plan.leaves_result else "stopped")
            return False
        may_pass = cause is None or cause.may_pass
        reason = None
        if cause is not None and cause.is_same(self._last):
            reason = "the same error came again in the same step: it is not started again"
        elif may_pass and end.fruitless > self._plan.max_restarts > 0:
            reason = f"{end.fruitless} starts in a row without a new checkpoint (launch.max_restarts): given up"
        for text in (reason, cause.text if cause else None):
            if text is not None:
                print_line(f"\n{text}", 2)
        return may_pass and reason is None and end.fruitless <= self._plan.max_restarts

    def _pause(self, end: End) -> None:
        """Wait before the next start: not at all after progress, then longer and longer."""
        where = f"from step {end.step}" if end.step >= 0 else "from the beginning"
        pause = min(2.0 ** (end.fruitless - 2), _LONGEST_PAUSE_S) if end.fruitless > 1 else 0.0
        count = f", {end.fruitless} of {self._plan.max_restarts} without a new checkpoint" if end.fruitless else ""
        print_line(f"starting again {where}{count}" + (f", in {pause:.0f} s" if pause else ""))
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and self._interrupt.number is None and not self._interrupt.again:
            time.sleep(_POLL_S)

    def _report_slow(self, attempt: Path, seen: Seen, usual_ms: float) -> None:
        assert seen.beat is not None
        text = (
            f"rank {seen.rank} on {seen.beat.host} is slow: by itself it takes {seen.beat.own_ms:.0f} ms a step, "
            f"the others {usual_ms:.0f} ms (step {seen.beat.step})"
        )
        print_line(f"straggler: {text}")
        with suppress(OSError), (attempt / "stragglers.txt").open("a") as file:
            file.write(text + "\n")


def _say_that_it_is_gone(attempt: Path) -> int:
    """Say that a run lost its folder while it trained, whatever its ranks said: it is not begun anew by itself."""
    path = attempt.parent.parent
    for place in (runs.checkpoints_of(path), path):
        with suppress(OSError):  # a save may have made them again, in the way of who puts them back
            place.rmdir()
    remedy = "put it back, or see that its disk is there; the same command then goes on"
    error = TrainingError(f"the run's folder {path} has gone while it trained", remedy=remedy)
    print_line(f"\nerror: {error}", 2)
    return error.exit_code


class _Interrupt:
    """What SIGINT, SIGTERM and SIGHUP do while ranks run.

    The first lets them save and leave at a step boundary, a second gives them some seconds for it, a third ends them.
    SIGUSR2 lets them save, too, and be started again by who sent it, unless it is ignored: a scheduler tells the ranks.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.again = False
        self._wishes = Wishes()
        self._deadline: float | None = None

    def __enter__(self) -> None:
        leaving = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            leaving.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in leaving}
        if signal.getsignal(signal.SIGUSR2) is not signal.SIG_IGN:
            self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._wish_again)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _wish_again(self, number: int, frame: FrameType | None) -> None:
        self.again = True

    def is_over(self, now: float) -> bool:
        """Whether the ranks have had their time."""
        return self._deadline is not None and now > self._deadline

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if not self._wishes.hear(number, by_hand=True):
            return
        if self._wishes.count == 1:
            self.number = number
        elif self._wishes.count == 2:
            self._deadline = time.monotonic() + SHORT_WAIT_S
        else:
            self._deadline = time.monotonic()


# ---- what is noted in the run folder, and read by `bigtrain runs` ----------


def note_start(attempt: Path, place: Mapping[str, object]) -> None:
    """Note who started an attempt, where, when, and from which checkpoint."""
    held = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "step": newest_step(attempt)}
    write_atomically(attempt / "start.json", json.dumps({**held, **place}, indent=2) + "\n")


def newest_step(attempt: Path) -> int:
    """The step of the newest committed checkpoint of an attempt's run; -1 where there is none."""
    return runs.newest_step(attempt.parent.parent)


def is_finished(attempt: Path) -> bool:
    """Whether the run of an attempt has been marked as finished."""
    return (attempt.parent.parent / "result.json").exists()


def fruitless_starts(attempt: Path) -> int:
    """How often the run failed in a row, before this attempt, since there was a new checkpoint."""
    if not attempt.name.isdigit():
        return 0
    before = attempt.with_name(str(int(attempt.name) - 1))
    start, end = read_json(before / "start.json"), read_json(before / "end.json")
    if end or not start:
        return int(end.get("fruitless", 0))
    # Its launcher was killed: it failed, and made progress if there is a newer checkpoint than it began with.
    return 1 + (0 if newest_step(attempt) > start.get("step", -1) else fruitless_starts(before))
