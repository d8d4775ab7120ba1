"""The live view of a run on a terminal: a bar, and the numbers that are watched, in as many columns as there are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigtrain.tracking.wording import decimal, duration, rates, size

# Drawing takes a millisecond or two, which may be as long as a step; nobody reads faster than this.
SECONDS_BETWEEN_DRAWINGS = 0.25
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_LOSSES = 256
_LOG_FROM = 10.0  # losses that are so many times apart are drawn by their logarithms


class View:
    """Draws the state of a run in three lines that stay where they are.

    Args:
        console: Where to.
        title: What the run is called.
        total_steps: The end of the bar.
    """

    def __init__(self, console: RichConsole, title: str, total_steps: int) -> None:
        self._console, self._title, self._total = console, title, total_steps
        self._losses = Losses()
        self._row: Mapping[str, Any] = {}
        self._scores: dict[str, float] = {}
        self._saved: tuple[int, float] | None = None
        self._began: tuple[float, int] | None = None
        self._drawn_at = -math.inf
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def show(self, row: Mapping[str, Any]) -> None:
        """Take a row of numbers, and draw it if it is time."""
        self._row = row
        self._losses.add(row["loss"])
        self.draw(row["step"], is_last=row["step"] == self._total)

    def scored(self, scores: Mapping[str, float]) -> None:
        """Take the numbers of an evaluation."""
        others = {name: value for name, value in scores.items() if name != "loss"}
        self._scores = others or {f"evaluation {name}": value for name, value in scores.items()}

    def saved(self, step: int) -> None:
        """Take word of a checkpoint."""
        self._saved = (step, time.monotonic())

    def draw(self, step: int, *, apart: float = SECONDS_BETWEEN_DRAWINGS, is_last: bool = False) -> None:
        """Draw, unless that was done so many seconds ago."""
        now = time.monotonic()
        if not is_last and now - self._drawn_at < apart:
            return
        self._drawn_at = now
        # Counted from the first numbers on: the steps before them are slower.
        self._began = self._began or (now, step)
        self._live.update(self._picture(step, now), refresh=True)

    def close(self) -> None:
        """Leave a last picture, with all that was told, where it is, and go below it."""
        if self._row:
            self.draw(self._row["step"], is_last=True)
        self._live.stop()

    def _picture(self, step: int, now: float) -> Group:
        width = self._console.width
        share = step / self._total
        done = f" {step:,}/{self._total:,}  {share:.0%}{self._left(step, now)}"
        bar = ProgressBar(total=self._total, completed=step, width=max(width - len(done), 8))
        first = Table.grid()
        first.add_row(bar, Text(done, style="bold", no_wrap=True))
        return Group(first, self._line(self._learning(width)), self._line(self._running(now)))

    def _left(self, step: int, now: float) -> str:
        assert self._began is not None
        at, first = self._began
        if not first < step < self._total:
            return ""
        return f"  {duration((now - at) / (step - first) * (self._total - step))} left"

    def _learning(self, width: int) -> Iterable[Text]:
        row = self._row
        if not row:
            return
        yield Text.assemble(("loss ", "dim"), (decimal(row["loss"]), "bold"))
        if width >= 60 and (line := self._losses.line(24 if width < 100 else 32)) and self._can_show(line):
            yield Text(line, style="cyan")
        for name, score in list(self._scores.items())[:2]:
            yield Text.assemble((f"{name} ", "dim"), decimal(score))
        yield Text.assemble(("lr ", "dim"), rates(row["lr"]))
        yield Text.assemble(("norm ", "dim"), f"{row['grad_norm']:.3g}")

    def _running(self, now: float) -> Iterable[Text]:
        row = self._row
        yield Text(self._title, style="dim")
        if not row:
            return
        yield Text(f"epoch {row['epoch'] + 1}")
        if "tokens_per_s" in row:
            yield Text(f"{row['tokens_per_s']:,.0f} tokens/s")
        else:
            yield Text(f"{row['samples_per_s']:,.0f} samples/s")
        if "mfu" in row:
            yield Text(f"mfu {row['mfu']:.1%}")
        if row.get("peak_memory_bytes"):
            whose = f" (rank {row['peak_memory_rank']})" if "peak_memory_rank" in row else ""
            yield Text.assemble(("memory ", "dim"), f"{size(row['peak_memory_bytes'])}{whose}")
        if self._saved is not None:
            step, at = self._saved
            yield Text.assemble(("saved ", "dim"), f"step {step:,}", (f", {duration(now - at)} ago", "dim"))

    def _line(self, parts: Iterable[Text]) -> Text:
        """As many parts as fit, the first ones first."""
        line = Text(no_wrap=True, overflow="ellipsis")
        for part in parts:
            gap = 3 if line.plain else 0
            if line.cell_len + gap + part.cell_len <= self._console.width:
                line.append(" " * gap)
                line.append_text(part)
        return line

    def _can_show(self, text: str) -> bool:
        try:
            text.encode(self._console.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True


class Losses:
    """The losses of the whole run in a bounded number of places: where they run out, neighbours become their mean."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        self._sum, self._count = 0.0, 0

    def add(self, loss: float) -> None:
        """Take one more; what is not finite is left out."""
        if not math.isfinite(loss):
            return
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == _MOST_LOSSES:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._each *= 2

    def line(self, cells: int) -> str:
        """A sparkline of at most so many cells; empty for fewer than two values."""
        means = self._means
        if len(means) < 2:
            return ""
        if len(means) > cells:
            edges = [round(place * len(means) / cells) for place in range(cells + 1)]
            means = [sum(means[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(means), max(means)
        if low > 0 and high > _LOG_FROM * low:
            means = [math.log(value) for value in means]
            low, high = math.log(low), math.log(high)
        scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BLOCKS[round((value - low) * scale)] for value in means)
