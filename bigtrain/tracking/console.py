"""What rank 0 says while it trains: a live view on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from bigtrain.terminal import print_nowhere
from bigtrain.tracking import wording
from bigtrain.tracking.base import kind_of
from bigtrain.tracking.live import View

# Plain lines go to log files that people scroll through: dense at first, then fewer, evaluations and events aside.
_LINE_EVERY = ((30.0, 2.0), (600.0, 10.0), (float("inf"), 50.0))  # (seconds since the start, seconds between lines)
# Where steps are slow, a line all the same, so that a log shows that the run is alive; and a fresh view.
_SECONDS_UNTIL_A_SIGN, _SECONDS_UNTIL_A_DRAWING = 55.0, 5.0


class _Terminal(RichConsole):
    """A console that says no more once its output has gone: rich would end the training for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):
            print_nowhere(self.file.fileno())  # what is left in its buffer would fail again at the end

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()


class Console:
    """Shows progress.

    The view is drawn by the training thread when there are numbers: a drawing thread would take time from every step.
    Only where numbers are seldom does a thread draw in between, and give signs of life in a log.

    Args:
        total_steps: The end of the bar.
        style: auto, bar, plain or none; auto draws a live view on a terminal and writes lines elsewhere.
        log_file: Where the plain lines go as well, whatever the style.
        title: What the run is called.
        step: Asked for the number of steps taken, between two rows of numbers.
    """

    def __init__(
        self,
        total_steps: int,
        style: str = "auto",
        log_file: Path | None = None,
        *,
        title: str = "",
        step: Callable[[], int] | None = None,
    ) -> None:
        # In a notebook rich would make a widget of the view and a block of HTML of every line.
        self._rich = _Terminal(highlight=False, soft_wrap=True, force_jupyter=False)
        self._total, self._title = total_steps, title
        can_draw = sys.stdout.isatty() and not self._rich.is_dumb_terminal
        self._style = style if style != "auto" else ("bar" if can_draw else "plain")
        self._log_file = log_file
        self._view: View | None = None
        self._began_at = time.monotonic()
        self._said_at = -float("inf")
        self._once: set[str] = set()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        if step is not None:
            self._watcher = threading.Thread(target=self._watch, args=(step,), name="console", daemon=True)
            self._watcher.start()

    def say(self, text: str) -> None:
        """Print one line above the view."""
        self._write(text)
        if self._style != "none":
            self._rich.print(text, markup=False)

    def say_once(self, text: str) -> None:
        """Print a line that has not been printed yet."""
        if text not in self._once:
            self._once.add(text)
            self.say(text)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one row."""
        kind = kind_of(row)
        if kind == "event":
            self._event(row)
        elif kind == "eval":
            self._evaluation(row)
            if self._view is not None:
                self._view.scored(wording.scores(row))
        elif kind == "train":
            self._numbers(row)

    def leave_view(self) -> None:
        """Draw the view for the last time, and go below it: what is said from now on comes after it."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def close(self) -> None:
        """Leave the view as it is, and go below it."""
        self.leave_view()

    def _evaluation(self, row: Mapping[str, Any]) -> None:
        words = wording.evaluation(row)
        if self._style != "bar":
            self.say(words)
            return
        self._write(words)
        while len(words) > self._rich.width and "  " in words:  # what does not fit stands in the log
            words = words.rpartition("  ")[0]
        self._rich.print(words, markup=False)

    def _event(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "checkpoint" and self._view is not None:
            self._view.saved(row["step"])
        words = wording.event(row)
        if words is not None and self._style == "bar" and row["event"] == "checkpoint":
            self._write(words)  # the view shows the last one
        elif words is not None:
            self.say_once(words)

    def _numbers(self, row: Mapping[str, Any]) -> None:
        if self._style == "bar":
            self._view = self._view or View(self._rich, self._title, self._total)
            self._view.show(row)
        now = time.monotonic()
        apart = next(apart for until, apart in _LINE_EVERY if now - self._began_at < until)
        if now - self._said_at >= apart or row["step"] >= self._total:
            self._line(wording.numbers(row, self._total))

    def _line(self, text: str) -> None:
        self._said_at = time.monotonic()
        if self._style == "bar":
            self._write(text)
        else:
            self.say(text)

    def _watch(self, step: Callable[[], int]) -> None:
        while not self._closing.wait(_SECONDS_UNTIL_A_DRAWING):
            if self._view is not None and step() < self._total:
                self._view.draw(step(), apart=_SECONDS_UNTIL_A_DRAWING - 0.1)
            if time.monotonic() - max(self._said_at, self._began_at) > _SECONDS_UNTIL_A_SIGN:
                self._line(f"step {step()}/{self._total}")

    def _write(self, text: str) -> None:
        if self._log_file is None:
            return
        try:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError:  # a full disk must not end a run; that it is full is said by who writes what matters
            self._log_file = None
