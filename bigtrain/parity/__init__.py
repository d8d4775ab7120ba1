"""Is it the same training? Every way to compute it against one plain loop, on the user's own run.

Floating-point addition is not associative and training is chaotic, so the question is asked as long as it has an
answer: the reference also runs against itself with its batches split, and steps count while that difference stays a
tenth of what is allowed.
"""

from __future__ import annotations

import importlib.util
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
from bigtrain.dist import World
from bigtrain.errors import CombinationError
from bigtrain.fitting import try_first_batch
from bigtrain.models.blocks import batchnorm_over_batch, find_blocks
from bigtrain.parity.compare import (
    BF16_FIRST_LOSS,
    BF16_FIRST_NORM,
    BF16_MOST_DISTANCE,
    FROZEN,
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
from bigtrain.prepare import has_compiler
from bigtrain.processes import preload_engines, run_ranks
from bigtrain.trainer import Subject, build_data, build_task, prepare_whole, show_labels

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
    engines: Sequence[str] | None = None,
    world_sizes: Sequence[int] = (1, 2),
    accumulations: Sequence[int] = (1, 2),
    precisions: Sequence[str] = ("fp32", "fp64", "bf16"),
    compiles: bool | None = None,
    subject: Subject | None = None,
    tamper: Tamper | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compare a run with the plain loop under every combination.

    Args:
        config: The run file.
        steps: How many steps to compare.
        engines: Which engines, DeepSpeed's stages as `deepspeed:2`; `single` runs in one process only. None: all.
        world_sizes: How many processes.
        accumulations: Microbatches in a full step.
        precisions: fp32 and fp64 each against its own reference, bf16 against the engine single in bf16.
        compiles: Whether to compile, too: once an engine, in fp32. None: where there is a compiler.
        subject: A model, data or task given as objects.
        tamper: For tests, which plant faults: a context that every rank under test runs in.
        said: Told what is being done.

    Raises:
        CombinationError: Where the run differs by nature, as BatchNorm over a rank's own batch does.
    """
    folder = Path(tempfile.mkdtemp(prefix="bigtrain-parity-"))
    names = every_engine() if engines is None else engines
    search = _Search(config, subject or Subject(), steps, folder, tamper, said, list(accumulations))
    search.compiles = has_compiler() if compiles is None else compiles
    if search.compiles or any(name.startswith("deepspeed") for name in names):
        preload_engines()
    try:
        for precision in precisions:
            for engine, world_size in _places(names, world_sizes, precision):
                is_last = engine == "single" or world_size == world_sizes[-1]
                search.compare(engine, world_size, precision, compiles=is_last)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return search.report()


def every_engine() -> tuple[str, ...]:
    """The engines that can be compared here: DeepSpeed's stages where it is installed."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    stages = ("deepspeed:1", "deepspeed:2", "deepspeed:3") if has_deepspeed else ()
    return ("single", "ddp", "fsdp", *stages)


def _places(engines: Sequence[str], world_sizes: Sequence[int], precision: str) -> Iterator[tuple[str, int]]:
    for engine, world_size in itertools.product(engines, world_sizes):
        if engine.startswith("deepspeed") and (precision == "fp64" or (precision, engine) == ("bf16", "deepspeed:0")):
            continue  # it cannot
        if engine != "single":
            yield engine, world_size
        elif world_size == world_sizes[0]:
            yield engine, 1


@dataclass
class _Search:
    """What has been found so far, and what it is compared with."""

    config: Config
    subject: Subject
    steps: int
    folder: Path
    tamper: Tamper | None
    said: Callable[[str], None]
    accumulations: list[int]
    compiles: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    plains: dict[str, _Plain] = field(default_factory=dict)
    rounded: dict[int, list[StepDifference]] = field(default_factory=dict)

    def compare(self, engine: str, world_size: int, precision: str, *, compiles: bool) -> None:
        """Run every variant of one engine at one world size in one precision, and judge it."""
        plain = self._plain("fp32" if precision == "bf16" else precision)
        ways = [(accumulation, "none", "none") for accumulation in self.accumulations]
        ways += [(self.accumulations[0], "full", "none")] if plain.has_blocks else []
        if self.compiles and compiles and precision == "fp32":
            ways += [(self.accumulations[0], "none", "blocks" if plain.has_blocks else "model")]
        variants = [Variant(engine, world_size, a, recompute, precision, compiled) for a, recompute, compiled in ways]
        self.said(f"{engine} × {world_size}, {precision}")
        for variant, found in zip(variants, self._measure(variants, plain, self.tamper), strict=True):
            if precision == "bf16":
                self.verdicts.append(judge_bf16(variant, found, self._rounded(variant, plain)))
            else:
                self.verdicts.append(judge(variant, found, plain.horizon))

    def report(self) -> Report:
        """What came of it all."""
        switched_off = next((plain.switched_off for plain in self.plains.values()), [])
        apart = sorted({name for plain in self.plains.values() for name in plain.apart})
        return Report(self.verdicts, switched_off, apart, self.steps)

    def _plain(self, precision: str) -> _Plain:
        if precision not in self.plains:
            self.said(f"plain torch, one process, {precision}, {self.steps} steps, twice")
            varied = self.config.model_copy(update={"precision": precision})
            arguments = (varied, self.subject, self.steps, self.folder / precision)
            self.plains[precision] = run_ranks(_run_plainly, 1, arguments)[0]
        return self.plains[precision]

    def _rounded(self, variant: Variant, plain: _Plain) -> list[StepDifference]:
        """The engine single in bf16, in as many parts: bf16 rounds otherwise in others."""
        parts = variant.world_size * variant.accumulation
        if parts not in self.rounded:
            single = Variant("single", 1, parts, "none", "bf16")
            self.rounded[parts] = self._measure([single], plain, None)[0]
        return self.rounded[parts]

    def _measure(self, variants: list[Variant], plain: _Plain, tamper: Tamper | None) -> list[list[StepDifference]]:
        variant = variants[0]
        engine = self.config.engine
        name, _, stage = variant.engine.partition(":")
        deepspeed = engine.deepspeed.model_copy(update={"stage": int(stage)}) if stage else engine.deepspeed
        placed = engine.model_copy(update={"name": name, "deepspeed": deepspeed})
        config = self.config.model_copy(update={"precision": variant.precision, "engine": placed})
        arguments = (config, variants, plain.reference, self.subject, plain.apart, tamper)
        found: list[list[StepDifference]] = run_ranks(measure, variant.world_size, arguments)[0]
        return found


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


def judge_bf16(variant: Variant, differences: Sequence[StepDifference], single: Sequence[StepDifference]) -> Verdict:
    """Hold the first step, and the distance from fp32 over all of them, against the engine single in bf16.

    The verdict's loss and norm are those of the first step; its parameters are the distance as a multiple of single's.
    """
    ours, theirs = differences[0].values, single[0].values
    loss, norm = (abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True))
    farthest = max(differences, key=lambda d: d.parameters)
    multiple = farthest.parameters / max(*(d.parameters for d in single), 1e-30)
    verdict = Verdict(variant, len(differences), loss, norm, multiple)
    moved = next((step for step, d in enumerate(differences) if d.moved), None)
    if moved is not None:
        return replace(verdict, failed_at=moved + 1, failed_what=FROZEN, worst=differences[moved].moved)
    if not loss <= BF16_FIRST_LOSS:
        return replace(verdict, failed_at=1, failed_what="loss", worst="")
    if not norm <= BF16_FIRST_NORM:
        return replace(verdict, failed_at=1, failed_what="gradient norm", worst="")
    if not multiple <= BF16_MOST_DISTANCE:
        worst = f"{farthest.worst} ({farthest.worst_difference:.1e})"
        step = differences.index(farthest) + 1
        return replace(verdict, failed_at=step, failed_what="parameters", worst=worst)
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
    task, sets = build_task(config, subject), build_data(config, subject)
    show_labels(task, sets)
    dataset = sets.train
    trajectories = []
    for splits in (1, 2):
        model = prepare_whole(config, subject)
        switched_off = switch_off_dropout(model)
        _refuse_what_differs_by_nature(model)
        try_first_batch(task, model, sets, World(), config.run.seed)
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
