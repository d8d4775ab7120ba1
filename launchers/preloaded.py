"""Imports what ranks need, in the process that they are forked from, and has that end with the agent."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress

from launchers.guarded import PARENT_VARIABLE, PRELOAD_VARIABLE, end_with_parent

end_with_parent(int(os.environ[PARENT_VARIABLE]))
os.environ[PARENT_VARIABLE] = str(os.getpid())

for _name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")):
    if _name == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at its import; with a GPU nothing of it is imported here
    # A rank that needs it will meet the same error, and tell it.
    with suppress(Exception):
        importlib.import_module(_name)
