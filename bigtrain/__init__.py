"""bigtrain trains and fine-tunes PyTorch models: one run file, several engines, the same losses under each.

    import bigtrain

    run = bigtrain.train("run.yaml", model=my_model)

What stands here is imported when it is first used, so that commands which need no torch do not wait for it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Config": "bigtrain.config.schema:Config",
    "Hook": "bigtrain.progress:Hook",
    "Run": "bigtrain.running:Run",
    "StepInfo": "bigtrain.progress:StepInfo",
    "load_config": "bigtrain.config.loader:load",
    "load_run": "bigtrain.tracking.reading:load_run",
    "load_trained": "bigtrain.evaluating:load_trained",
    "sum_over_ranks": "bigtrain.tasks.measured:sum_over_ranks",
    "train": "bigtrain.running:train",
}

__all__ = [
    "Config",
    "Hook",
    "Run",
    "StepInfo",
    "__version__",
    "load_config",
    "load_run",
    "load_trained",
    "sum_over_ranks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
