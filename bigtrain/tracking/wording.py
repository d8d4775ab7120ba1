"""Rows in words, as the terminal and its log show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def numbers(row: Mapping[str, Any], total_steps: int) -> str:
    """The numbers of a step in a line, those that matter most first."""
    parts = [f"step {row['step']}/{total_steps}", f"loss {decimal(row['loss'])}"]
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    else:
        parts.append(f"{row['samples_per_s']:,.0f} samples/s")
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    parts += [f"epoch {row['epoch'] + 1}", f"lr {rates(row['lr'])}", f"norm {row['grad_norm']:.3g}"]
    return "  ".join(parts)


def evaluation(row: Mapping[str, Any]) -> str:
    """The numbers of an evaluation in a line."""
    shown = [f"{name} {decimal(score)}" for name, score in scores(row).items()]
    return f"epoch {row['epoch'] + 1}, step {row['step']}: evaluation  " + "  ".join(shown)


def scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by their names."""
    return {key[5:]: value for key, value in row.items() if key.startswith("eval/") and isinstance(value, float)}


def event(row: Mapping[str, Any]) -> str | None:
    """What happened in a line; None where the line was said already, or is none to say."""
    if row["event"] == "checkpoint" and "bytes" in row:
        best = f", the best: {row['best'].partition(' at step')[0]}" if "best" in row else ""
        return f"step {row['step']}: checkpoint, {size(row['bytes'])} in {row['seconds']:.1f} s{best}"
    if (
        row["event"] in ("phase", "phase proved", "rollback", "spike", "warning", "early stop", "profile")
        and "text" in row
    ):
        return f"step {row['step']}: {row['event']}: {row['text']}"
    return None


def decimal(number: float) -> str:
    """A loss or a score: with four places, unless it is so small or large that these would say nothing."""
    return f"{number:.4f}" if number == 0 or 1e-3 <= abs(number) < 1e6 else f"{number:.4g}"


def rates(lrs: Sequence[float]) -> str:
    """Learning rates, each once."""
    return "/".join(f"{lr:.3g}" for lr in dict.fromkeys(lrs))


def size(num_bytes: float) -> str:
    """A number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
