"""Run a function in several gloo processes on this machine; warnings in them are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtrain.processes import preload_engines, run_ranks

preload_engines()  # some seconds, which every rank of every test would take


def run_distributed(func: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Call `func(*args)` in `world_size` processes of one gloo group and return what each returned, by rank.

    The function is a plain top-level one. What a rank raises is raised here, with its traceback.
    """
    return run_ranks(func, world_size, args, timeout_s=timeout_s, strict=True)
