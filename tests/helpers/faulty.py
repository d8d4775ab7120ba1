"""How much the fault suite tries: a part of it each time, all of it with `make faults`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigtrain.checkpoint.files import Files, Hook

FULL = os.environ.get("BIGTRAIN_FAULTS") == "full"


@contextmanager
def before_file_operations(hook: Hook) -> Iterator[None]:
    """Have something happen before every file operation of a run's checkpoints, in this process."""

    def both(before: Hook) -> Files:
        def call(operation: str, path: Path) -> None:
            hook(operation, path)
            before(operation, path)

        return Files(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigtrain.running.Files", both)
        yield
