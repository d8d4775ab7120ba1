"""A whole run, from a run file to its folder: what `bigtrain train` and `bigtrain.train` do in one process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain import engines, failures, lease, runs
from bigtrain.beats import FINISHING
from bigtrain.checkpoint.files import Files
from bigtrain.config.loader import Resolved, dump, from_dict, load
from bigtrain.config.schema import Config
from bigtrain.dist import World, join
from bigtrain.errors import (
    BigtrainError,
    ConfigError,
    OutOfMemoryError,
    SaveError,
    SpikeError,
    TrainingError,
    UserError,
)
from bigtrain.health.pulse import Pulse, stop_wished, told
from bigtrain.health.sameness import check_same
from bigtrain.health.signals import ignore_from_now_on
from bigtrain.health.spikes import Spike
from bigtrain.phases import Phases, begin_proof
from bigtrain.progress import Hook, Outcome, StepInfo
from bigtrain.protocols import Dataset, Task
from bigtrain.resuming import saved_state, source_of
from bigtrain.runs import write_atomically
from bigtrain.saving import Keeper, expected_bytes
from bigtrain.starting import allowed_for
from bigtrain.telling import Telling, begin_telling, finish_telling, tell_failure
from bigtrain.tracking.making import check_trackers
from bigtrain.tracking.reading import read_rows
from bigtrain.trainer import Subject
from bigtrain.watching import Graph, Watching

MOST_ROLLED_BACK = 3
"""How many spikes may lead back to one step."""


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    Attributes:
        path: The run folder.
        outcome: How it ended: steps, samples, the last evaluation.
        model: The plain module with the trained weights, not their averages (`load_trained` has those); under fsdp,
            with this rank's shards of them.
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
    hooks: Hook | Callable[[StepInfo], None] | Sequence[Hook | Callable[[StepInfo], None]] = (),
) -> Run:
    """Train as a run file says, in this process, or as one rank where RANK and WORLD_SIZE are set.

    Args:
        config: A run file's path, its contents as a mapping, or what `load_config` returned.
        overrides: `key=value`, as on the command line; several, or one alone.
        model: A module, or a function that makes one, instead of `model.name`.
        data: A dataset, or a pair to train and to evaluate on, instead of `data.name`.
        task: A task instead of `task.name`.
        hooks: Functions to call after steps: `fn` for every step, `Hook(fn, every=10)` for every tenth; or one alone.

    Raises:
        BigtrainError: One of its kinds, with what to do. Where it is a `UserError`, nothing has been created.
    """
    subject = Subject(model, data, task)
    resolved = resolve(config, overrides, subject)
    called = _as_hooks(hooks)
    with word_of_failure() as failing:
        return _train(resolved, subject, called, failing)


def _as_hooks(hooks: Any) -> list[Hook]:
    """Hooks of what was given: functions and hooks, or one alone.

    Raises:
        UserError: Where one cannot be called, or not after so many steps.
    """
    given = [hooks] if callable(hooks) or isinstance(hooks, Hook) else list(hooks)
    called = [hook if isinstance(hook, Hook) else Hook(hook) for hook in given]
    for hook in called:
        said = f"a hook is a {type(hook.call).__name__}, which cannot be called" if not callable(hook.call) else None
        if not isinstance(hook.every, int) or hook.every < 1:
            said = f"a hook is to be called every {hook.every} steps"
        if said:
            raise UserError(said, where="hooks=", remedy="give functions of one StepInfo, or Hook(function, every=10)")
    return called


def resolve(
    config: Config | Resolved | Mapping[str, Any] | str | Path, overrides: Sequence[str], subject: Subject
) -> Config:
    """Read whatever describes a run; what is given as an object stands in it by its type's name."""
    given: Any = config
    if not isinstance(given, Config | Resolved | Mapping | str | Path):
        problem = f"a run is described by a run file's path or by a mapping, not by a {type(given).__name__}"
        raise ConfigError(problem, remedy="give one of them")
    if isinstance(config, Resolved):
        config = config.config
    if isinstance(config, Config):
        changes = [overrides] if isinstance(overrides, str) else overrides
        return from_dict(config.model_dump(), changes).config if changes else config
    named = [
        f"{section}.name=given:{_type_name(value)}"
        for section, value in (("model", subject.model), ("data", subject.data), ("task", subject.task))
        if value is not None
    ]
    changes = (*named, *([overrides] if isinstance(overrides, str) else overrides))
    return (from_dict(config, changes) if isinstance(config, Mapping) else load(config, changes)).config


def _type_name(value: object) -> str:
    name = getattr(value, "__name__", type(value).__name__)
    return name if name.isidentifier() else type(value).__name__


def _train(config: Config, subject: Subject, hooks: Sequence[Hook], failing: Failing) -> Run:
    failing.rank = int(os.environ.get("RANK", 0))
    if failing.rank == 0:
        runs.check_free(config.run.dir, config.run.name, allowed_for(config))
    check_trackers(config)  # on every rank: what it imports is code that `check_same` compares
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    engine, _ = engines.choose(config.engine.name, num_processes)
    recorder, path, pulse = Graph(config), Path(config.run.dir, config.run.name), Pulse()
    with (
        torch_set_up(config),
        join(config.engine.device, needs_group=engines.needs_group(engine), timeout_s=group_timeout_s(config)) as world,
        told(pulse, world),
        lack_of_memory_explained(config, world, engine),
        closing(Phases(config, world, subject, runs.checkpoints_of(path), recorder.see)) as phases,
    ):
        check_same(world, dump(config), phases.training.fingerprint)
        folder = _begin(config, world)
        with lease.renewed(path, folder.number) if world.is_main else nullcontext():
            outcome = _run(phases, folder, hooks, failing, recorder, pulse)
        world.all_reduce(torch.zeros(1))  # a launcher ends the others some time after the first has ended
        model = phases.training.model
    return Run(path, outcome, model)


def group_timeout_s(config: Config) -> float:
    """How long a collective may wait: the launcher, which can tell who is missing, is to speak first."""
    limits = (config.health.hang_timeout_s, config.health.startup_timeout_s)
    return max((limit for limit in limits if limit is not None), default=1800.0) + 60.0


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
    phases: Phases, folder: runs.RunFolder, hooks: Sequence[Hook], failing: Failing, graph: Graph, pulse: Pulse
) -> Outcome:
    config, is_main, resumed = phases.training.config, phases.training.world.is_main, phases.resumed
    telling = Telling()
    if is_main:
        done = resumed.outcome.steps if resumed else 0
        words = [*phases.words, *([] if resumed else _word_of_loss(folder))]
        telling = begin_telling(
            phases.training, folder, done, words, lambda: failing.outcome.steps if failing.outcome else done
        )
    try:
        if is_main and phases.started:
            write_atomically(folder.path / "init_report.json", json.dumps(phases.started.as_dict(), indent=1) + "\n")
        graph.keep(folder.path, telling.say, is_main=is_main)
        outcome = _all_phases(phases, folder, telling, hooks, failing, pulse)
        ignore_from_now_on()
        pulse.phase = FINISHING
        if is_main:
            finish_telling(telling, folder, outcome, phases.training, failing.examples)
        return outcome
    except BaseException as error:
        if isinstance(error, UserError):
            error.exit_code = TrainingError.exit_code  # the run has begun: its folder is there
        tell_failure(telling, folder, failing.outcome.steps if failing.outcome else 0, error, config)
        raise
    finally:
        telling.close()


def _word_of_loss(folder: runs.RunFolder) -> list[str]:
    """That a run begins anew, though it had begun: it never does so in silence."""
    with suppress(OSError):
        if folder.metrics.stat().st_size:
            return [f"this run has begun before, and left no checkpoint in {folder.checkpoints}: it begins anew"]
    return []


def _all_phases(
    phases: Phases, folder: runs.RunFolder, telling: Telling, hooks: Sequence[Hook], failing: Failing, pulse: Pulse
) -> Outcome:
    config, world = phases.training.config, phases.training.world
    keeper = Keeper(
        world,
        folder.checkpoints,
        config.checkpoint,
        source_of(lambda: phases.training),
        attempt=str(folder.number),
        still_ours=lambda: lease.owns(folder.path, folder.number),
        tell=telling.tell,
        before_save=telling.flush,
        files=Files(before=lambda operation, path: pulse.beat()),
    )
    undone: list[int] = []  # the steps that spikes led back to
    try:
        while True:
            outcome, spike = _one_phase(phases, folder, keeper, telling, hooks, failing, pulse)
            if outcome.stopped or (outcome.is_done and not spike):
                keeper.close()
                return outcome
            if spike:
                _roll_back(phases, spike, undone, telling)
            else:
                phases.next()
    finally:
        if world.size == 1:  # several ranks could wait here for one that has failed
            with suppress(SaveError):
                keeper.settle()


def _roll_back(phases: Phases, spike: Spike, undone: list[int], telling: Telling) -> None:
    """Undo a spike, unless others before it led back to the same step. Every rank must call it.

    Raises:
        SpikeError: Where the loss leaps again and again from there.
    """
    phases.roll_back(spike)
    done = phases.resumed.outcome.steps if phases.resumed else 0
    undone.append(done)
    if undone.count(done) > MOST_ROLLED_BACK:
        raise SpikeError(
            f"{spike}, in step {spike.step}, and so it was {MOST_ROLLED_BACK} times before from step {done}",
            where=f"step {spike.step}",
            remedy="lower optim.lr or set optim.clip_grad_norm; look at the data; or set health.on_spike=tell",
        )
    text = f"back to step {done}, without the batches up to that of step {spike.step}"
    telling.tell({"step": done, "event": "rollback", "text": text, "position": list(spike.end)})


def _one_phase(
    phases: Phases,
    folder: runs.RunFolder,
    keeper: Keeper,
    telling: Telling,
    hooks: Sequence[Hook],
    failing: Failing,
    pulse: Pulse,
) -> tuple[Outcome, Spike | None]:
    """Train until what is trainable changes, a loss leaps that is to be undone, or to the end."""
    training, resumed = phases.training, phases.resumed
    done = resumed.outcome if resumed else Outcome()
    trained = {name for group in training.plan.groups for name in group.names}
    bytes_expected = expected_bytes(saved_state(training), trained, training.plan.bytes_per_element())
    keeper.expect(bytes_expected, done.steps if resumed else None)
    watching = Watching(training, folder.path, telling.tell, done.steps)
    proof = begin_proof(training, resumed, telling.tell)
    looking = [*watching.hooks, Hook(proof)] if proof else watching.hooks
    loop = training.loop(telling.trackers, [*hooks, *looking], keeper, done, pulse)
    failing.outcome = loop.outcome
    try:
        with stop_wished(folder, loop.ask_to_stop) if training.world.is_main else nullcontext():
            outcome = loop.run()
        failing.examples = loop.examples.found
        return outcome, loop.spike
    finally:
        watching.close()


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
    examples: Sequence[Any] = ()  # what the last evaluation showed
    outcome: Outcome | None = None  # not the loop, which would keep the model of a phase that is over


@contextmanager
def word_of_failure() -> Iterator[Failing]:
    """Leave word for the launcher of why and in which step this rank failed."""
    failing = Failing()
    try:
        yield failing
    except BaseException as error:
        attempt = os.environ.get(runs.ATTEMPT_VARIABLE)
        if attempt:
            failures.write_error(attempt, failing.rank, failing.outcome.steps if failing.outcome else None, error)
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
