"""A whole run, from a run file to its folder: what `bigtrain train` and `bigtrain.train` do in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import engines, lease, runs
from bigtrain.config.loader import Resolved, dump, from_dict, load
from bigtrain.config.schema import Config
from bigtrain.dist import World, join
from bigtrain.errors import BigtrainError, OutOfMemoryError, SaveError, TrainingError, UserError
from bigtrain.loop import Loop
from bigtrain.prepare import COMPUTE_DTYPES, DTYPES
from bigtrain.progress import Hook, Outcome, StepInfo, Tracker
from bigtrain.protocols import Dataset, Task
from bigtrain.report import write_report
from bigtrain.resuming import Resumed, resume, source_of
from bigtrain.saving import Keeper, expected_bytes
from bigtrain.starting import allowed_for
from bigtrain.tracking.console import Console
from bigtrain.tracking.making import check_trackers, make_trackers
from bigtrain.tracking.mfu import Utilisation, WithMFU, utilisation
from bigtrain.tracking.reading import read_rows
from bigtrain.tracking.repro import write_repro
from bigtrain.trainer import Subject, Training, assemble

# Larger results (the confusion matrix of thousands of classes) do not go into result.json.
_LARGEST_IN_RESULT = 10_000


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    Attributes:
        path: The run folder.
        outcome: How it ended: steps, samples, the last evaluation.
        model: The plain module with the trained weights; under fsdp, with this rank's shards of them.
    """

    path: Path
    outcome: Outcome
    model: nn.Module = field(repr=False)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The last evaluation's numbers."""
        return self.outcome.evaluation

    def history(self) -> list[dict[str, Any]]:
        """The lines of numbers in metrics.jsonl, those of earlier starts of the run included."""
        return read_rows(self.path)


def train(
    config: Config | Resolved | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Dataset | tuple[Dataset, Dataset | None] | None = None,
    task: Task | None = None,
    hooks: Sequence[Hook | Callable[[StepInfo], None]] = (),
) -> Run:
    """Train as a run file says, in this process, or as one rank where RANK and WORLD_SIZE are set.

    Args:
        config: A run file's path, its contents as a mapping, or what `load_config` returned.
        overrides: `key=value`, as on the command line.
        model: A module, or a function that makes one, instead of `model.name`.
        data: A dataset, or a pair to train and to evaluate on, instead of `data.name`.
        task: A task instead of `task.name`.
        hooks: Functions to call after steps: `fn` for every step, `Hook(fn, every=10)` for every tenth.

    Raises:
        BigtrainError: One of its kinds, with what to do. Where it is a `UserError`, nothing has been created.
    """
    subject = Subject(model, data, task)
    resolved = resolve(config, overrides, subject)
    called = [hook if isinstance(hook, Hook) else Hook(hook) for hook in hooks]
    with word_of_failure() as failing:
        return _train(resolved, subject, called, failing)


def resolve(
    config: Config | Resolved | Mapping[str, Any] | str | Path, overrides: Sequence[str], subject: Subject
) -> Config:
    """Read whatever describes a run; what is given as an object stands in it by its type's name."""
    if isinstance(config, Resolved):
        config = config.config
    if isinstance(config, Config):
        return from_dict(config.model_dump(), overrides).config if overrides else config
    named = [
        f"{section}.name=given:{_type_name(value)}"
        for section, value in (("model", subject.model), ("data", subject.data), ("task", subject.task))
        if value is not None
    ]
    changes = (*named, *overrides)
    return (from_dict(config, changes) if isinstance(config, Mapping) else load(config, changes)).config


def _type_name(value: object) -> str:
    name = getattr(value, "__name__", type(value).__name__)
    return name if name.isidentifier() else type(value).__name__


def _train(config: Config, subject: Subject, hooks: Sequence[Hook], failing: Failing) -> Run:
    failing.rank = int(os.environ.get("RANK", 0))
    if failing.rank == 0:
        runs.check_free(config.run.dir, config.run.name, allowed_for(config))
        check_trackers(config)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    engine, _ = engines.choose(config.engine.name, num_processes)
    with (
        torch_set_up(config),
        join(config.engine.device, needs_group=engines.needs_group(engine)) as world,
        lack_of_memory_explained(config, world, engine),
        closing(assemble(config, world, subject)) as training,
    ):
        model, path = training.model, Path(config.run.dir, config.run.name)
        resumed = resume(training, runs.checkpoints_of(path)) if config.checkpoint.resume == "auto" else None
        if resumed:
            training.go_on_from(resumed.outcome)
        folder = _begin(config, world)
        with lease.renewed(path, folder.number) if world.is_main else nullcontext():
            outcome = _run(training, folder, resumed, hooks, failing)
    return Run(path, outcome, model)


def _begin(config: Config, world: World) -> runs.RunFolder:
    """Begin the run, or go on with it, in its folder. Every rank must call it; rank 0 does it.

    Nothing is created before every rank has come this far.
    """
    world.all_reduce(torch.zeros(1))
    begun: runs.RunFolder | BigtrainError | None = None
    if world.is_main:
        try:
            begun = runs.RunFolder.create(config.run.dir, config.run.name, dump(config), allowed_for(config))
        except BigtrainError as error:
            begun = error
    begun = world.all_gather_object(begun)[0]
    if isinstance(begun, BigtrainError):
        raise begun
    assert begun is not None
    return begun


def _run(
    training: Training, folder: runs.RunFolder, resumed: Resumed | None, hooks: Sequence[Hook], failing: Failing
) -> Outcome:
    world = training.world
    trackers: Sequence[Tracker] = []
    console: Console | None = None
    if world.is_main:
        log = folder.logs / "rank-00000.stdout"
        write_repro(folder.path, folder.number, _gpus(world))
        console = Console(training.cadence.total_steps, training.config.track.progress, log)
        console.say("\n".join([_first_lines(training), *(resumed.words if resumed else ())]))
        made = make_trackers(
            training.config,
            folder.path,
            folder.logs / "trackers.log",
            console.say,
            engine=training.engine.name,
            world_size=world.size,
            step=resumed.outcome.steps if resumed else 0,
        )
        trackers = _with_mfu([*made, console], training, console)
    try:
        outcome = _loop(training, folder, resumed, trackers, hooks, failing)
        if console is not None:
            _finish(folder, outcome, training, console)
        return outcome
    except UserError as error:
        error.exit_code = TrainingError.exit_code  # the run has begun: its folder is there
        raise
    finally:
        for tracker in trackers:
            tracker.close()


def _loop(
    training: Training,
    folder: runs.RunFolder,
    resumed: Resumed | None,
    trackers: Sequence[Tracker],
    hooks: Sequence[Hook],
    failing: Failing,
) -> Outcome:
    def tell(row: Mapping[str, Any]) -> None:
        for tracker in trackers:
            tracker.log(row)

    config, world = training.config, training.world
    done = resumed.outcome if resumed else Outcome()
    keeper = Keeper(
        world,
        folder.checkpoints,
        config.checkpoint,
        source_of(training),
        attempt=str(folder.number),
        still_ours=lambda: lease.owns(folder.path, folder.number),
        tell=tell,
    )
    trained = {name for group in training.plan.groups for name in group.names}
    state = training.engine.state()
    keeper.expect(expected_bytes(state, trained, training.plan.bytes_per_element()), done.steps if resumed else None)
    tell({"step": done.steps, "event": "start", "attempt": folder.number, "engine": training.engine_label})
    loop = training.loop(trackers, hooks, keeper, done)
    failing.loop = loop
    try:
        return loop.run()
    finally:
        if world.size == 1:  # several ranks could wait here for one that has failed
            with suppress(SaveError):
                keeper.settle()


def _gpus(world: World) -> list[str]:
    if world.device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _with_mfu(trackers: Sequence[Tracker], training: Training, console: Console) -> Sequence[Tracker]:
    """The trackers, with the utilisation of the GPUs where it can be told; where not, it is said once why."""
    if training.world.device.type != "cuda":
        return trackers
    found = _utilisation(training, torch.cuda.get_device_name(training.world.device))
    if isinstance(found, str):
        console.say(f"no mfu: {found}")
        return trackers
    return [WithMFU(trackers, found)]


def _utilisation(training: Training, device_name: str) -> Utilisation | str:
    config = training.config
    ours, theirs = config.data.args.get("context"), config.model.args.get("context")
    if None not in (ours, theirs) and ours != theirs:
        return f"the model says what {theirs} tokens cost (model.args.context), and samples have {ours}"
    dtype = COMPUTE_DTYPES.get(config.precision, DTYPES[config.precision])
    return utilisation(training.model, device_name, dtype, training.world.size)


def _finish(folder: runs.RunFolder, outcome: Outcome, training: Training, console: Console) -> None:
    if outcome.stopped:
        _report(folder, training.config, console)
        console.say(f"stopped after step {outcome.steps} of {training.cadence.total_steps}, as asked: {folder.path}")
        return
    numbers = {name: _plain(value) for name, value in outcome.evaluation.items() if _is_small(value)}
    folder.finish(
        {
            "steps": outcome.steps,
            "samples": outcome.samples,
            "skipped_steps": outcome.num_skipped,
            "engine": training.engine.name,
            "world_size": training.world.size,
            "metrics": numbers,
        }
    )
    scores = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))
    console.say(
        f"done: {outcome.steps} steps, {outcome.samples} samples" + (f"\nevaluation: {scores}" if scores else "")
    )
    _report(folder, training.config, console)
    console.say(f"run folder: {folder.path}")


def _report(folder: runs.RunFolder, config: Config, console: Console) -> None:
    """Write the report of what there is; it must not make a run fail that went well."""
    if not config.track.report:
        return
    try:
        console.say(f"report: {write_report(folder.path)}")
    except Exception as error:
        console.say(f"warning: there is no report: {type(error).__name__}: {error}")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _is_small(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() <= _LARGEST_IN_RESULT


def _first_lines(training: Training) -> str:
    config, world = training.config, training.world
    parameters = sum(piece[0] for piece in training.sizes)
    trained = sum(piece[0] for piece in training.sizes if piece[1])
    share = "" if trained == parameters else f", {trained:,} of them trained"
    return (
        f"{config.run.name}: {config.model.name} ({parameters:,} parameters{share}) on {config.data.name} "
        f"({training.train.num_samples:,} samples), {training.cadence.total_steps} steps of {config.data.batch_size}\n"
        f"{training.engine_choice}, {world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    )


@contextmanager
def torch_set_up(config: Config) -> Iterator[None]:
    """What the run file says of torch itself, put back at the end: a notebook goes on."""
    threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.run.threads != "auto":
        torch.set_num_threads(config.run.threads)
    if config.run.deterministic:
        # What cuBLAS needs for it, by torch's documentation. It is read once, so it stays.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warned)


class Failing:
    """What is known of this rank when it fails."""

    rank = 0
    loop: Loop | None = None


@contextmanager
def word_of_failure() -> Iterator[Failing]:
    """Leave word for the launcher of why and in which step this rank failed."""
    failing = Failing()
    try:
        yield failing
    except BaseException as error:
        attempt = os.environ.get(runs.ATTEMPT_VARIABLE)
        if attempt:
            runs.write_error(attempt, failing.rank, failing.loop.outcome.steps if failing.loop else None, error)
        raise


@contextmanager
def lack_of_memory_explained(config: Config, world: World, engine: str) -> Iterator[None]:
    """Tell what to change, in order of cost, where memory runs out."""
    try:
        yield
    except Exception as error:
        cause = _lack_of_memory(error)
        if cause is None:
            raise
        said = str(cause).partition("\n")[0] or type(cause).__name__
        raise OutOfMemoryError(
            f"out of memory on {world.device}: {said}",
            where=f"rank {world.rank}",
            remedy="change, in order of cost:\n" + "\n".join(_ways_to_save_memory(config, world, engine)),
        ) from error


def _lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The first cause of an error, the error itself included, if it is that memory ran out."""
    found = None
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            found = error
        error = error.__cause__
    return found


def _ways_to_save_memory(config: Config, world: World, engine: str) -> list[str]:
    """What to change, the cheapest first."""
    share = -(-config.data.batch_size // world.size)
    micro = min(config.train.micro_batch_size or share, share)
    ways = []
    if micro > 1:
        ways.append(f"train.micro_batch_size={micro // 2} (it is {micro}; the results stay the same)")
    if engine != "fsdp":
        ways.append("engine.name=fsdp on more processes (weights, gradients and optimizer state are sharded)")
    elif world.device.type == "cuda" and not config.engine.fsdp.cpu_offload:
        ways.append("engine.fsdp.cpu_offload=true (slower), or more processes")
    if config.optim.name in ("adam", "adamw"):
        ways.append("optim.name=sgd (it keeps fewer numbers, and trains otherwise)")
    ways.append("a smaller model, or a shorter context")
    return [f"{number}. {way}" for number, way in enumerate(ways, 1)]
