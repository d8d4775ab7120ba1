"""Which evaluation was the best so far, and whether it is time to stop: decided alike on every rank.

What has come of a goal is a few plain values that stand in every checkpoint, so a run that goes on decides as it would
have. Whether to stop is a function of these values and the run file: with more patience in it, a run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.errors import UserError

BEST, PATIENCE = "best", "patience"


@dataclass(frozen=True)
class Standing:
    """What has come of a goal.

    Attributes:
        metric: By which evaluations are compared.
        value: The best one's; None where none was a number yet.
        step: After which step that was.
        since: How many evaluations in a row have been no better.
    """

    metric: str
    value: float | None = None
    step: int = 0
    since: int = 0

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.6g} at step {self.step:,}" if self.value is not None else "none"


class Goals:
    """The goals of a run file. Every rank must make it, and make the same calls.

    Args:
        world: The ranks.
        early_stop: When to stop before the end; None: never.
        keep_best: By what the best is known; None: it is not kept.
    """

    def __init__(
        self, world: World, early_stop: schema.EarlyStop | None = None, keep_best: schema.KeepBest | None = None
    ) -> None:
        self._world, self._early_stop, self._keep_best = world, early_stop, keep_best

    @property
    def may_stop(self) -> bool:
        """Whether a run may end before its last step."""
        return self._early_stop is not None

    def _goals(self) -> Iterator[tuple[str, str, schema.EarlyStop | schema.KeepBest, float]]:
        """Each with its name, its key in the run file, and by how much it has to get better."""
        if self._early_stop is not None:
            yield PATIENCE, "eval.early_stop", self._early_stop, self._early_stop.min_delta
        if self._keep_best is not None:
            yield BEST, "checkpoint.keep_best", self._keep_best, 0.0

    def check(self, numbers: Mapping[str, Any] | None) -> None:
        """See that evaluations have what is asked for.

        Args:
            numbers: An evaluation; None where the run has none.

        Raises:
            UserError: Where there is no such number among them.
        """
        for _, key, goal, _ in self._goals():
            if numbers is None:
                raise UserError(
                    "evaluations are to be compared, and the run has no data to evaluate on",
                    where=key,
                    remedy="hold out a share, data.eval: {split: 0.1}; or take the key out",
                )
            if _number(numbers.get(goal.metric)) is None:
                known = ", ".join(name for name, value in numbers.items() if _number(value) is not None)
                raise UserError(
                    f"an evaluation has no number {goal.metric!r}", where=f"{key}.metric", remedy=f"it has: {known}"
                )

    def see(self, numbers: Mapping[str, Any], step: int, standings: dict[str, Standing]) -> bool:
        """Compare an evaluation with those before it, and note what has come of each goal.

        Returns:
            Whether it is the best so far, which is to be kept.
        """
        self.check(numbers)
        for name, _, goal, min_delta in self._goals():
            value = self._agreed(_number(numbers[goal.metric]))
            before = standings.get(name)
            if before is None or before.metric != goal.metric:
                before = Standing(goal.metric)
            sign = 1.0 if goal.is_better_when_small else -1.0
            is_better = math.isfinite(value) and (before.value is None or sign * (before.value - value) > min_delta)
            standings[name] = (
                Standing(goal.metric, value, step) if is_better else replace(before, since=before.since + 1)
            )
        return self._keep_best is not None and standings[BEST].step == step and standings[BEST].since == 0

    def _agreed(self, value: float | None) -> float:
        """Rank 0's value, on every rank: a metric of the user's own may differ in its last bits."""
        mine = torch.tensor(value if self._world.is_main else 0.0, dtype=torch.float64)
        return self._world.all_reduce(mine).item()

    def stops(self, standings: Mapping[str, Standing]) -> bool:
        """Whether the run has come to its end before its last step."""
        found = standings.get(PATIENCE)
        wanted = self._early_stop
        return (
            wanted is not None
            and found is not None
            and found.metric == wanted.metric
            and (found.since >= wanted.patience)
        )


def _number(value: Any) -> float | None:
    """A metric as a number; None where it is none, as a matrix is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) else None
