"""metrics.jsonl: one JSON object a line, from which every other picture of a run can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.runs import to_json


class MetricsFile:
    """Appends lines of numbers to a file.

    Floats are written so that they read back to the last bit; those that JSON does not know as "nan", "inf" and "-inf".

    Args:
        path: The file; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(to_json(row), separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
