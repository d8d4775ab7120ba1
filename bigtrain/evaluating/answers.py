"""What a trained model says of one input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """What came of one input.

    Attributes:
        input: A file, or a prompt.
        answer: By name, in the order in which it is to be shown.
    """

    input: str
    answer: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """One flat row."""
        return {"input": self.input, **self.answer}
