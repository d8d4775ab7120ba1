"""Run a function in several gloo processes on this machine; warnings in them are errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bigtrain.processes import preload, run_ranks

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where deepspeed is imported
for _module in (  # some seconds, which every rank of every test would take
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "torch._dynamo.repro.after_aot",
    "bigtrain.engines.ddp",
    "bigtrain.engines.deepspeed",
    "bigtrain.engines.fsdp",
):
    preload(_module)


def run_distributed(func: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Call `func(*args)` in `world_size` processes of one gloo group and return what each returned, by rank.

    The function is a plain top-level one. What a rank raises is raised here, with its traceback.
    """
    return run_ranks(func, world_size, args, timeout_s=timeout_s, strict=True)
