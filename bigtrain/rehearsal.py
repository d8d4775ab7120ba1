"""A run tried out: everything it will need, once, on its own data and engine, in about a minute.

Two steps, an evaluation, a save; then everything is built anew, the state is loaded, and the third step is taken again.
It must be the step that would have been taken.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bigtrain import engines
from bigtrain.checkpoint import Ranks, open_checkpoint, save
from bigtrain.config.schema import Config
from bigtrain.dist import join
from bigtrain.errors import NonFiniteError, StateError
from bigtrain.loop import evaluate, train_step
from bigtrain.pretrained import start_from
from bigtrain.running import lack_of_memory_explained, torch_set_up
from bigtrain.tasks.measured import Doubts
from bigtrain.trainer import Subject, Training, assemble

_STEPS = 2
_EVAL_BATCHES = 2
# A step from the state that was loaded, against the same step from the state that was saved: the same arithmetic on
# the same bits, but for the order in which threads and libraries add.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rehearsal:
    """What came of it.

    Attributes:
        total_steps: How many steps the run will take.
        step_seconds: How long a step took, the first one left out.
        peak_bytes: The most memory a GPU held on this rank; None on a CPU.
        checkpoint_bytes: The size of a checkpoint.
    """

    total_steps: int
    step_seconds: float
    peak_bytes: int | None
    checkpoint_bytes: int


def rehearse(config: Config, folder: Path, said: Callable[[str], None], subject: Subject | None = None) -> Rehearsal:
    """Try a run out. Every rank must call it.

    Args:
        config: The run file.
        folder: Where to save to; all ranks see it.
        said: Told on rank 0, line by line, what works.
        subject: What the user brings as objects.

    Raises:
        BigtrainError: What does not work.
    """
    name, _ = engines.choose(config.engine.name, int(os.environ.get("WORLD_SIZE", 1)))
    with (
        torch_set_up(config),
        join(config.engine.device, needs_group=engines.needs_group(name)) as world,
        lack_of_memory_explained(config, world, name),
    ):

        def tell(text: str) -> None:
            if world.is_main:
                said(text)

        began = time.perf_counter()
        training = assemble(config, world, subject or Subject())
        started = start_from(training)
        for line in started.lines() if started else ():
            tell(line)
        tell(f"built: {training.engine_choice}, {world.size} process{'es' if world.size > 1 else ''}, {_since(began)}")
        times, losses = zip(*itertools.islice(_steps(training), _STEPS), strict=True)
        tell(f"{_STEPS} steps: losses {', '.join(f'{loss:.4f}' for loss in losses)}; {times[-1]:.3g} s a step")
        if training.evaluation is not None:
            batches = (training.move(batch) for batch in itertools.islice(training.evaluation, _EVAL_BATCHES))
            numbers = evaluate(training.engine, training.task, batches, world)
            tell(f"evaluation of {_EVAL_BATCHES} batches: loss {numbers['loss']:.4f}")
            for doubt in Doubts(world).about(numbers):
                tell(f"warning: {doubt}")
        began = time.perf_counter()
        path = save(Ranks(world), folder, _STEPS, training.engine.state(), extra={})
        size_of = sum(file.stat().st_size for file in path.iterdir())
        tell(f"saved: {size_of / 1e6:.1f} MB, {_since(began)}")
        expected = _third(training)
        peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
        total_steps = training.cadence.total_steps
        training.close()
        del training
        began = time.perf_counter()
        again = assemble(config, world, subject or Subject())
        again.engine.load(open_checkpoint(path))
        tell(f"built anew and loaded: {_since(began)}")
        _compare(_third(again), expected)
        tell(f"the step after it: loss {expected:.4f}, as without the save")
        again.close()
    return Rehearsal(total_steps, times[-1], peak, size_of)


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.1f} s"


def _steps(training: Training) -> Iterator[tuple[float, float]]:
    """The seconds and the loss of each step, from the first on."""
    for number, data in enumerate(training.train.steps()):
        began = time.perf_counter()
        microbatches = [training.move(batch) for batch in data.microbatches]
        result = train_step(training.engine, training.task, microbatches, training.schedule(number))
        loss = float(result.loss)
        if bool(result.skipped):
            raise NonFiniteError(
                f"the loss or the gradient of step {number + 1} is not finite",
                remedy="lower optim.lr, or look at the first samples",
            )
        yield time.perf_counter() - began, loss


def _third(training: Training) -> float:
    """Take the third step: its loss."""
    torch.manual_seed(training.config.run.seed + training.world.rank)  # dropout must draw the same both times
    data = next(itertools.islice(training.train.steps(), _STEPS, None))
    microbatches = [training.move(batch) for batch in data.microbatches]
    return float(train_step(training.engine, training.task, microbatches, training.schedule(_STEPS)).loss)


def _compare(ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= _TOLERANCE * abs(theirs):
        raise StateError(
            f"the third step's loss is {ours!r} after loading the state, and {theirs!r} without",
            remedy="the model may keep state in neither parameters nor persistent buffers: register what it keeps as\n"
            "buffers; or its loss may depend on random numbers that it draws by itself",
        )
