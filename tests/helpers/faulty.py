"""How much the fault suite tries: a part of it each time, all of it with `make faults`."""

from __future__ import annotations

import os

FULL = os.environ.get("BIGTRAIN_FAULTS") == "full"
