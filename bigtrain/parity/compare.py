"""One engine at one world size against the reference, on every rank; and what came of it.

Each rank compares the pieces it holds with the same parts of the reference's files, so nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtrain.config.schema import Config
from bigtrain.dist import World, join
from bigtrain.engines import needs_group
from bigtrain.loop import train_step
from bigtrain.parity.reference import Trajectory
from bigtrain.parity.stillness import switch_off_dropout
from bigtrain.state import WEIGHT
from bigtrain.trainer import Subject, Training, assemble


@dataclass(frozen=True)
class Variant:
    """One way to compute the same training.

    Attributes:
        engine: The engine's name, for deepspeed with its stage: `deepspeed:2`.
        world_size: How many processes.
        accumulation: Microbatches in a full step.
        recompute: The activation checkpointing: none or full.
        precision: Of the run.
        compiled: What torch.compile has: none, blocks or model.
    """

    engine: str
    world_size: int
    accumulation: int
    recompute: str
    precision: str
    compiled: str = "none"

    def __str__(self) -> str:
        extras = [f"accumulation {self.accumulation}"]
        extras += ["activation checkpointing"] if self.recompute != "none" else []
        extras += [f"compiled {self.compiled}"] if self.compiled != "none" else []
        return f"{self.engine} × {self.world_size}, {', '.join(extras)}, {self.precision}"


@dataclass(frozen=True)
class Tolerance:
    """How far a variant may be from the reference, relative.

    Attributes:
        scalar: Loss, and gradient norm before clipping.
        parameters: All parameters together, the norm of the difference over the norm.
    """

    scalar: float
    parameters: float

    def tenth(self) -> Tolerance:
        """What rounding alone may take of it, in a step that still counts."""
        return Tolerance(self.scalar / 10, self.parameters / 10)


TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4), "fp64": Tolerance(1e-10, 1e-10)}
# bf16 is chaotic after its first step. In that one, loss and norm are compared with those of the engine single in bf16;
# over all steps, the parameters' distance from fp32 is held against that engine's.
BF16_FIRST_LOSS, BF16_FIRST_NORM, BF16_MOST_DISTANCE = 1e-6, 1e-3, 1.5
# Nothing computes a frozen parameter: it has no tolerance in any precision.
FROZEN = "frozen parameter"


@dataclass(frozen=True)
class StepDifference:
    """How far one step is from the reference, relative.

    Attributes:
        loss: Of the mean loss.
        norm: Of the gradient's norm before clipping.
        parameters: Of all parameters together, after the step.
        worst: The parameter that is furthest off.
        worst_difference: How far that one is.
        values: The loss and the norm themselves.
        moved: A frozen parameter that is not what it was, to the last bit.
    """

    loss: float
    norm: float
    parameters: float
    worst: str
    worst_difference: float
    values: tuple[float, float]
    moved: str | None = None

    def exceeds(self, tolerance: Tolerance) -> str | None:
        """What is out of tolerance first: a frozen parameter, loss, norm, all parameters."""
        if self.moved:
            return FROZEN
        for what, value, limit in (
            ("loss", self.loss, tolerance.scalar),
            ("gradient norm", self.norm, tolerance.scalar),
            ("parameters", self.parameters, tolerance.parameters),
        ):
            if not value <= limit:  # NaN is out of tolerance
                return what
        return None


Squares = Mapping[str, tuple[float, float]]
"""By parameter: squared norm of the difference, squared norm of the reference."""


def measure(
    config: Config,
    variants: Sequence[Variant],
    reference: Trajectory,
    subject: Subject,
    apart: Sequence[str],
    tamper: Callable[[], AbstractContextManager[Any]] | None,
) -> list[list[StepDifference]]:
    """Train under an engine and measure every step. Runs on every rank.

    Args:
        config: The run file with the engine and precision of the variants.
        variants: Which differ in nothing else; one training each.
        reference: What it should be.
        subject: Objects that a user gave instead of names.
        apart: Parameters that are left out of the comparison.
        tamper: A context in which all of it happens: tests plant faults there.

    Returns:
        Differences of each step, by variant; the same on every rank.
    """
    found = []
    with (
        (tamper or nullcontext)(),
        join(config.engine.device, needs_group=needs_group(config.engine.name)) as world,
    ):
        for variant in variants:
            training = assemble(_varied(config, variant, world), world, subject, adapt=switch_off_dropout)
            found.append([_one_step(training, step, reference, apart) for step in _numbered(training, reference)])
            training.close()
    return found


def _varied(config: Config, variant: Variant, world: World) -> Config:
    share = math.ceil(config.data.batch_size / world.size)
    micro = None if variant.accumulation == 1 else math.ceil(share / variant.accumulation)
    train = config.train.model_copy(update={"micro_batch_size": micro})
    compiled = config.compile.model_copy(update={"scope": variant.compiled})
    changes = {"train": train, "activation_checkpointing": variant.recompute, "compile": compiled}
    return config.model_copy(update=changes)


def _numbered(training: Training, reference: Trajectory) -> Any:
    return zip(range(len(reference.losses)), training.train.steps(), strict=False)


def _one_step(training: Training, step: tuple[int, Any], reference: Trajectory, apart: Sequence[str]) -> StepDifference:
    number, data = step
    microbatches = [training.move(batch) for batch in data.microbatches]
    result = train_step(training.engine, training.task, microbatches, training.schedule(number))
    pieces = [p for p in training.engine.state().pieces if p.kind == WEIGHT and p.is_owner]
    target = reference.parameters(number)
    mine = [(p.name, _squares(p.data.cpu().numpy(), target[p.name][p.box.slices])) for p in pieces]
    squares: dict[str, tuple[float, float]] = {}
    for part in training.world.all_gather_object(mine):
        for name, (difference, size) in part:  # a rank may hold several pieces of one parameter
            before = squares.get(name, (0.0, 0.0))
            squares[name] = (before[0] + difference, before[1] + size)
    return difference_of(float(result.loss), float(result.norm), squares, reference, number, apart)


def _squares(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    theirs = theirs.astype(np.float64)
    return float(np.square(ours.astype(np.float64) - theirs).sum()), float(np.square(theirs).sum())


def difference_of(
    loss: float, norm: float, squares: Squares, reference: Trajectory, step: int, apart: Sequence[str]
) -> StepDifference:
    """Put one step's numbers in relation to the reference's."""
    counted = {name: pair for name, pair in squares.items() if name not in apart}
    ratios = {name: _ratio(*pair) for name, pair in counted.items()}
    moved = next((name for name in reference.frozen if squares[name][0] != 0), None)
    worst = moved or max(ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else math.inf)
    together = _ratio(sum(d for d, _ in counted.values()), sum(s for _, s in counted.values()))
    return StepDifference(
        _relative(loss, reference.losses[step]),
        _relative(norm, reference.norms[step]),
        together,
        worst,
        ratios[worst],
        (loss, norm),
        moved,
    )


def floor_of(reference: Trajectory, split: Trajectory, apart: Sequence[str]) -> list[StepDifference]:
    """How far the reference is from itself with its batches split: rounding alone."""
    differences = []
    for step, (loss, norm) in enumerate(zip(split.losses, split.norms, strict=True)):
        ours, theirs = split.parameters(step), reference.parameters(step)
        squares = {name: _squares(ours[name], theirs[name]) for name in theirs}
        differences.append(difference_of(loss, norm, squares, reference, step, apart))
    return differences


def horizon_of(floor: Sequence[StepDifference], tolerance: Tolerance) -> int:
    """How many steps count: those before rounding alone takes a tenth of the tolerance."""
    for step, difference in enumerate(floor):
        if difference.exceeds(tolerance.tenth()):
            return step
    return len(floor)


def _ratio(difference: float, size: float) -> float:
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / size)


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-30)
