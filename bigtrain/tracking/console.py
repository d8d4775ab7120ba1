"""What rank 0 says while it trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn

# Plain lines go to log files that people scroll through: not more than one in this many seconds, evaluations aside.
_SECONDS_BETWEEN_LINES = 2.0
# Drawing takes a millisecond, which may be as long as a step; nobody reads faster than this.
_SECONDS_BETWEEN_DRAWINGS = 0.2
_BAR_CELLS = range(10, 41)


class Console:
    """Shows progress.

    The bar is drawn by the training thread when there are numbers: a drawing thread would take time from every step.

    Args:
        total_steps: The end of the bar.
        style: auto, bar, plain or none; auto draws a bar on a terminal and writes lines elsewhere.
        log_file: Where the plain lines go as well, whatever the style.
    """

    def __init__(self, total_steps: int, style: str = "auto", log_file: Path | None = None) -> None:
        # In a notebook rich would make a widget of the bar and a block of HTML of every line.
        self._rich = RichConsole(highlight=False, soft_wrap=True, force_jupyter=False)
        self._total = total_steps
        can_draw = sys.stdout.isatty() and not self._rich.is_dumb_terminal
        self._style = style if style != "auto" else ("bar" if can_draw else "plain")
        self._log_file = log_file
        self._bar: _Bar | None = None
        self._said_at = -_SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._write(text)
        if self._style != "none":
            self._rich.print(text, markup=False)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one line of numbers."""
        if "event" in row:
            words = _event(row)
            if words:
                self.say(words)
            return
        if any(key.startswith("eval/") for key in row):
            self.say(_evaluation(row))
            return
        if self._style == "bar":
            self._bar = self._bar or _Bar(self._rich, self._total)
            self._bar.show(row)
        if time.monotonic() - self._said_at < _SECONDS_BETWEEN_LINES and row["step"] < self._total:
            return
        self._said_at = time.monotonic()
        line = "  ".join(_numbers(row, self._total))
        if self._style == "bar":
            self._write(line)
        else:
            self.say(line)

    def close(self) -> None:
        """Leave the bar as it is, and go below it."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        if self._log_file is not None:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


class _Bar:
    """A bar and the numbers beside it, as many as the terminal is wide."""

    def __init__(self, console: RichConsole, total_steps: int) -> None:
        self._console, self._total = console, total_steps
        self._column = BarColumn()
        text = TextColumn("{task.description}", markup=False)
        self._progress = Progress(self._column, text, console=console, auto_refresh=False)
        self._task: TaskID = self._progress.add_task("", total=total_steps)
        self._began_at: float | None = None
        self._began_with = 0
        self._drawn_at = -_SECONDS_BETWEEN_DRAWINGS
        self._progress.start()

    def show(self, row: Mapping[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        is_due = now - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS or step == self._total
        self._drawn_at = now if is_due else self._drawn_at
        cells = min(max(self._console.width // 4, _BAR_CELLS[0]), _BAR_CELLS[-1])
        self._column.bar_width = cells
        parts = _numbers(row, self._total)
        parts[2:2] = self._left(now, step)
        while len("  ".join(parts)) > self._console.width - cells - 1 and len(parts) > 1:
            parts.pop()
        self._progress.update(self._task, completed=step, description="  ".join(parts), refresh=is_due)

    def _left(self, now: float, step: int) -> list[str]:
        """How long it will still take, counted from the first numbers on: the steps before them are slower."""
        if self._began_at is None:
            self._began_at, self._began_with = now, step
        if not self._began_with < step < self._total:
            return []
        seconds = (now - self._began_at) / (step - self._began_with) * (self._total - step)
        return [f"{_duration(seconds)} left"]

    def close(self) -> None:
        self._progress.stop()


def _numbers(row: Mapping[str, Any], total_steps: int) -> list[str]:
    """The numbers of a step, those that matter most first."""
    rates = "/".join(f"{lr:.2e}" for lr in dict.fromkeys(row["lr"]))
    utilisation = [f"mfu {row['mfu']:.1%}"] if "mfu" in row else []
    return [
        f"step {row['step']}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_s']:,.0f} samples/s",
        *utilisation,
        f"epoch {row['epoch'] + 1}",
        f"lr {rates}",
        f"norm {row['grad_norm']:.3f}",
    ]


def _event(row: Mapping[str, Any]) -> str | None:
    if row["event"] == "checkpoint":
        return f"step {row['step']}: checkpoint, {row['bytes'] / 1e6:.1f} MB in {row['seconds']:.1f} s"
    return None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _evaluation(row: Mapping[str, Any]) -> str:
    shown = [
        f"{key.removeprefix('eval/')} {value:.4f}"
        for key, value in row.items()
        if key.startswith("eval/") and isinstance(value, float)
    ]
    return f"epoch {row['epoch'] + 1}, step {row['step']}: evaluation  " + "  ".join(shown)
