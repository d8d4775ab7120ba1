"""Is it the same training? Every way to compute it against one plain loop, on the user's own run.

Floating-point addition is not associative and training is chaotic, so the question is asked as long as it has an
answer: the reference also runs against itself with its batches split, and steps count while that difference stays a
tenth of what is allowed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.schema import Config
from bigtrain.errors import CombinationError
from bigtrain.models.blocks import batchnorm_over_batch, find_blocks
from bigtrain.parity.compare import (
    TOLERANCES,
    StepDifference,
    Tolerance,
    Variant,
    floor_of,
    horizon_of,
    measure,
)
from bigtrain.parity.reference import Trajectory, train_plainly, without_true_gradient
from bigtrain.parity.stillness import refuse_mixing_of_samples, refuse_randomness, switch_off_dropout
from bigtrain.processes import run_ranks
from bigtrain.trainer import Subject, build_data, build_task, prepare_whole

# A shorter horizon says too little to call it proof.
LEAST_HORIZON = 5

Tamper = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Verdict:
    """What came of one variant.

    Attributes:
        variant: Which.
        horizon: How many steps count.
        loss, norm, parameters: The largest relative difference within the horizon.
        failed_at: The first step out of tolerance, from 1; None if there is none.
        failed_what: What is out of tolerance there.
        worst: The parameter that is furthest off there, and how far.
    """

    variant: Variant
    horizon: int
    loss: float
    norm: float
    parameters: float
    failed_at: int | None = None
    failed_what: str | None = None
    worst: str | None = None

    @property
    def worst_module(self) -> str:
        """The module that holds the parameter which is furthest off."""
        return (self.worst or "").split(" ")[0].rpartition(".")[0] or "the model itself"

    @property
    def outcome(self) -> str:
        """same, differs or inconclusive."""
        if self.failed_at is not None:
            return "differs"
        return "same" if self.horizon >= LEAST_HORIZON else "inconclusive"


@dataclass(frozen=True)
class Report:
    """What `bigtrain parity` found.

    Attributes:
        verdicts: One a variant.
        switched_off: What was switched off to compare.
        apart: Parameters left out because their true gradient is zero.
        steps: How many steps were asked for.
    """

    verdicts: list[Verdict]
    switched_off: list[str]
    apart: list[str]
    steps: int
    tolerances: dict[str, Tolerance] = field(default_factory=lambda: dict(TOLERANCES))

    @property
    def exit_code(self) -> int:
        """0 the same, 1 something differs, 3 inconclusive."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        return 1 if "differs" in outcomes else 3 if "inconclusive" in outcomes else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(v), "outcome": v.outcome} for v in self.verdicts]
        return {**asdict(self), "verdicts": rows, "exit_code": self.exit_code}


def run(
    config: Config,
    *,
    steps: int = 20,
    engines: Sequence[str] = ("single", "ddp", "fsdp"),
    world_sizes: Sequence[int] = (1, 2),
    accumulations: Sequence[int] = (1, 2),
    precisions: Sequence[str] = ("fp32", "fp64"),
    subject: Subject | None = None,
    tamper: Tamper | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compare a run with the plain loop under every combination.

    Args:
        config: The run file.
        steps: How many steps to compare.
        engines: Which engines; `single` runs in one process only.
        world_sizes: How many processes.
        accumulations: Microbatches in a full step.
        precisions: Each against its own reference.
        subject: A model, data or task given as objects.
        tamper: For tests, which plant faults: a context that every rank under test runs in.
        said: Told what is being done.

    Raises:
        CombinationError: Where the run differs by nature, as BatchNorm over a rank's own batch does.
    """
    folder = Path(tempfile.mkdtemp(prefix="bigtrain-parity-"))
    subject = subject or Subject()
    verdicts, switched_off, apart_of_any = [], list[str](), set[str]()
    try:
        for precision in precisions:
            varied = config.model_copy(update={"precision": precision})
            said(f"plain torch, one process, {precision}, {steps} steps, twice")
            plain = run_ranks(_run_plainly, 1, (varied, subject, steps, folder / precision))[0]
            switched_off, apart_of_any = plain.switched_off, apart_of_any | set(plain.apart)
            for engine, world_size in _places(engines, world_sizes):
                said(f"{engine} × {world_size}, {precision}")
                engine_config = varied.engine.model_copy(update={"name": engine})
                placed = varied.model_copy(update={"engine": engine_config})
                ways = [(accumulation, "none") for accumulation in accumulations]
                ways += [(accumulations[0], "full")] if plain.has_blocks else []
                variants = [Variant(engine, world_size, *way, precision) for way in ways]
                arguments = (placed, variants, plain.reference, subject, plain.apart, tamper)
                found = run_ranks(measure, world_size, arguments)[0]
                pairs = zip(variants, found, strict=True)
                verdicts += [judge(variant, differences, plain.horizon) for variant, differences in pairs]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Report(verdicts, switched_off, sorted(apart_of_any), steps)


def _places(engines: Sequence[str], world_sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    for engine, world_size in itertools.product(engines, world_sizes):
        if engine != "single":
            yield engine, world_size
        elif world_size == world_sizes[0]:
            yield engine, 1


def judge(variant: Variant, differences: Sequence[StepDifference], horizon: int) -> Verdict:
    """Hold the steps that count against the tolerance."""
    tolerance = TOLERANCES[variant.precision]
    counted = differences[:horizon]
    verdict = Verdict(
        variant,
        horizon,
        loss=max((d.loss for d in counted), default=0.0),
        norm=max((d.norm for d in counted), default=0.0),
        parameters=max((d.parameters for d in counted), default=0.0),
    )
    for step, difference in enumerate(counted):
        what = difference.exceeds(tolerance)
        if what:
            worst = f"{difference.worst} ({difference.worst_difference:.1e})"
            return replace(verdict, failed_at=step + 1, failed_what=what, worst=worst)
    return verdict


@dataclass(frozen=True)
class _Plain:
    """The plain training, and what it says of itself."""

    reference: Trajectory
    apart: list[str]
    horizon: int
    switched_off: list[str]
    has_blocks: bool


def _run_plainly(config: Config, subject: Subject, steps: int, folder: Path) -> _Plain:
    """Train plainly, and again with every global batch in two parts."""
    task, dataset = build_task(config, subject), build_data(config, subject).train
    trajectories = []
    for splits in (1, 2):
        model = prepare_whole(config, subject)
        switched_off = switch_off_dropout(model)
        _refuse_what_differs_by_nature(model)
        refuse_randomness(model, task, dataset)
        refuse_mixing_of_samples(model, task, dataset)
        place = folder / f"{splits}"
        trajectories.append(train_plainly(config, model, task, dataset, steps=steps, splits=splits, folder=place))
    reference, split = trajectories
    apart = without_true_gradient(reference, split)
    horizon = horizon_of(floor_of(reference, split, apart), TOLERANCES[config.precision])
    reference.gradients.clear()  # tensors do not travel between processes by value
    return _Plain(reference, apart, horizon, switched_off, bool(find_blocks(model)))


def _refuse_what_differs_by_nature(model: torch.nn.Module) -> None:
    names = batchnorm_over_batch(model)
    if names:
        raise CombinationError(
            f"BatchNorm normalises by whatever batch a process has, so splitting it changes the numbers: {names[0]}",
            where="model",
            remedy="use group norm (torchvision models: model.args.norm_layer=group_norm), or freeze it "
            "(finetune.freeze)",
        )
