"""What rank 0 says while it trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Plain lines go to log files that people scroll through: not more than one in this many seconds, evaluations aside.
_SECONDS_BETWEEN_LINES = 2.0


class Console:
    """Shows progress.

    Args:
        total_steps: The end of the bar.
        style: auto, bar, plain or none; auto draws a bar on a terminal and writes lines elsewhere.
        log_file: Where the plain lines go as well, whatever the style.
    """

    def __init__(self, total_steps: int, style: str = "auto", log_file: Path | None = None) -> None:
        self._log_file = log_file
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        self._total = total_steps
        self._style = style if style != "auto" else ("bar" if sys.stdout.isatty() else "plain")
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._said_at = -_SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._write(text)
        if self._style != "none":
            self._rich.print(text, markup=False)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one line of numbers."""
        if any(key.startswith("eval/") for key in row):
            self.say(_evaluation(row))
            return
        if self._style == "bar":
            self._show(row)
        if time.monotonic() - self._said_at < _SECONDS_BETWEEN_LINES and row["step"] < self._total:
            return
        self._said_at = time.monotonic()
        line = f"step {row['step']}/{self._total}  {_numbers(row)}"
        if self._style == "bar":
            self._write(line)
        else:
            self.say(line)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()

    def _write(self, text: str) -> None:
        if self._log_file is not None:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _show(self, row: Mapping[str, Any]) -> None:
        if self._progress is None:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._rich)
            self._progress.start()
            self._bar = self._progress.add_task("", total=self._total)
        assert self._bar is not None
        self._progress.update(self._bar, completed=row["step"], description=_numbers(row))


def _numbers(row: Mapping[str, Any]) -> str:
    rates = "/".join(f"{lr:.2e}" for lr in dict.fromkeys(row["lr"]))
    return (
        f"epoch {row['epoch'] + 1}  loss {row['loss']:.4f}  norm {row['grad_norm']:.3f}  "
        f"lr {rates}  {row['samples_per_s']:,.0f} samples/s"
    )


def _evaluation(row: Mapping[str, Any]) -> str:
    shown = [
        f"{key.removeprefix('eval/')} {value:.4f}"
        for key, value in row.items()
        if key.startswith("eval/") and isinstance(value, float)
    ]
    return f"epoch {row['epoch'] + 1}, step {row['step']}: evaluation  " + "  ".join(shown)
