"""Time: steps, epochs, evaluation, when to stop. What a step computes is the engine's and the task's.

The loop reads no config, knows no concrete engine, model or tracker, and between two log lines it does not wait for
the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigtrain.beats import DATA, EVALUATING, SAVING, TRAINING
from bigtrain.dist import World
from bigtrain.engines.base import Engine, Evaluator
from bigtrain.engines.sums import StepResult
from bigtrain.errors import DivergedError, NonFiniteError
from bigtrain.goals import Goals
from bigtrain.health.agreement import Agreement, check_buffers
from bigtrain.health.nonfinite import NonFiniteWatch, explain
from bigtrain.health.pulse import Pulse
from bigtrain.health.replicas import Replicas
from bigtrain.health.signals import stop_on_signals
from bigtrain.health.spikes import Spike, SpikeWatch
from bigtrain.metrics import Row
from bigtrain.optim import Schedule
from bigtrain.progress import Cadence, Examples, Hook, Outcome, Saver, SavesNothing, StepInfo, TrainBatch
from bigtrain.protocols import Batch, LossSum, Task
from bigtrain.tasks.measured import Doubts, checked, metrics_of
from bigtrain.tracking.base import Tracker
from bigtrain.tracking.meter import Meter


def train_step(
    engine: Engine,
    task: Task,
    microbatches: Sequence[Batch],
    lr_scale: float,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step on one global batch, of which `microbatches` are this rank's part.

    Every rank calls it with the same number of microbatches; `before_update` is called when there are gradients.
    """
    last = len(microbatches) - 1
    for number, batch in enumerate(microbatches):
        with engine.microbatch(last=number == last):
            engine.backward(task.loss(engine.model, batch))
    before_update()
    return engine.step(lr_scale)


def evaluate(
    engine: Evaluator,
    task: Task,
    batches: Iterable[Batch],
    world: World,
    look: Callable[[LossSum, Batch], None] | None = None,
) -> dict[str, Any]:
    """The mean loss and the task's metrics over all ranks' batches. Every rank must call it.

    Args:
        engine: Computes.
        task: Says what the loss is and how to measure.
        batches: This rank's part.
        world: The ranks.
        look: Shown what came of each microbatch.

    Raises:
        UserError: Where the metrics are none.
    """
    metrics = metrics_of(task)
    place = getattr(metrics, "to", None)
    if place is not None:
        place(world.device)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with engine.evaluating():
        for batch in batches:
            result = task.loss(engine.model, batch)
            sums[0] += result.total
            sums[1] += result.count
            metrics.update(result, batch)
            if look is not None:
                look(result, batch)
    total, count = world.all_reduce(sums).tolist()
    return {"loss": total / count if count else float("nan"), **checked(metrics.compute())}


class Loop:
    """Runs a training from its first step to its last.

    Args:
        engine: Computes.
        task: Says what the loss is.
        world: This rank's place.
        steps: This rank's part of each step's data, endless.
        eval_batches: Called for this rank's part of the evaluation data; None where there is none.
        schedule: The factor on the learning rates.
        base_lrs: Each optimizer group's own rate.
        cadence: When things happen.
        trackers: Where numbers go.
        hooks: Whom to tell.
        on_nonfinite: `stop` or `skip`.
        move: Puts a batch on the device.
        saver: Keeps the state on disk; None keeps nothing.
        done: How far the run has come already.
        pulse: Told of everything that is done.
        after_step: Told after a step how many have been taken, and whether this one was left out; nobody waits for it.
        compare_every: After how many steps the copies that ranks hold are compared; None: never.
        forward_waits: Whether ranks wait for one another in a forward pass.
        goals: When to stop early, and which evaluation is the best; None where there are none.
        spikes: Looks at the losses; None leaves them alone.

    Attributes:
        outcome: How far the run has come.
        spike: The loss that leapt and is to be undone, at which the loop has ended.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        world: World,
        steps: Iterator[TrainBatch],
        eval_batches: Callable[[], Iterable[Batch]] | None,
        schedule: Schedule,
        base_lrs: Sequence[float],
        cadence: Cadence,
        trackers: Sequence[Tracker],
        hooks: Sequence[Hook],
        on_nonfinite: str,
        move: Callable[[Batch], Batch],
        saver: Saver | None = None,
        done: Outcome | None = None,
        pulse: Pulse | None = None,
        after_step: Callable[[int, Tensor | bool], None] | None = None,
        compare_every: int | None = None,
        forward_waits: bool = False,
        goals: Goals | None = None,
        spikes: SpikeWatch | None = None,
    ) -> None:
        self._engine, self._task, self._world = engine, task, world
        self._pulse = pulse or Pulse()
        self._watched = self._pulse.watched(task, is_own=not forward_waits)
        self._replicas = Replicas(world, engine.state, compare_every)
        self._steps, self._eval_batches, self._move = steps, eval_batches, move
        self._schedule, self._base_lrs, self._cadence = schedule, base_lrs, cadence
        self._trackers, self._hooks, self._after_step = trackers, hooks, after_step
        self._agreement = Agreement(world)
        self._watch = NonFiniteWatch(world, on_nonfinite)
        self._spikes = spikes or SpikeWatch(None)
        self.spike: Spike | None = None
        self._meter = Meter(world)
        self._numbers_of_hooks: dict[str, float] = {}
        self._saver = saver or SavesNothing()
        self._goals = goals or Goals(world)
        self._doubts = Doubts(world)
        self._is_best = False  # the evaluation made after this step
        self.outcome = done or Outcome()
        self.examples = Examples(task)
        self._watch.num_skipped = self.outcome.num_skipped
        phase_at = cadence.phase_at
        self._phase = phase_at(self.outcome.steps, self.outcome.position[0]) if phase_at else 0

    def run(self) -> Outcome:
        """Train to the end, to the end of a phase, to a spike, or to where all ranks agreed to stop.

        Raises:
            NonFiniteError: On every rank in the same step.
            DivergedError: On every rank in the same step.
            CombinationError: After the first step, where the model's buffers differ between ranks.
        """
        first = self.outcome.steps + 1
        if self._is_done() and self._eval_batches is not None:
            # There was more than is asked for now, or what this state came to was not written: it is measured again.
            epoch, consumed = self.outcome.position  # of the step that would come next
            self.outcome.evaluation = self._evaluate(self.outcome.steps, epoch if consumed else max(epoch - 1, 0))
        try:
            with stop_on_signals(self._agreement):
                while not (self._is_done() or self._ends_phase() or self.outcome.stopped or self.spike):
                    self._one_step()
                    if self.outcome.steps == first and self._world.size > 1:
                        check_buffers(self._world, self._engine.state().pieces)
                self._raise_if(self._watch.last())
                self._look_for_spikes()
                self._note(SAVING)
                self._replicas.compare(self.outcome.steps)
                if self.spike:
                    self._hear_last_wishes()
                    self._saver.settle()
                elif self._ends_phase() and not self._is_done():
                    self._hear_last_wishes()
                    self._saver.commit(self.outcome)
                else:
                    self._saver.finish(self.outcome)
        except (NonFiniteError, DivergedError):  # on every rank in the same step: what is being written is good
            self._saver.settle()
            raise
        self._agreement.close()  # not after an error: that would wait for the others
        self._meter.close()
        self.outcome.is_done = self._is_done()
        return self.outcome

    def _hear_last_wishes(self) -> None:
        """What ranks have wished for since the last step would be lost with this loop."""
        wishes = [self._agreement.decide(), self._agreement.decide()]
        self.outcome.stopped |= any(agreed.stop for agreed in wishes)
        self.outcome.again |= any(agreed.again for agreed in wishes)

    def _look_for_spikes(self) -> None:
        """Tell of losses that leapt since the last look; every rank sees the same ones."""
        for spike in self._spikes.look():
            self._tell({"step": spike.step, "event": "spike", "text": str(spike)})
            if self._spikes.rolls_back:
                self.spike = spike
        self.outcome.recent = self._spikes.recent

    def _is_done(self) -> bool:
        return self.outcome.steps >= self._cadence.total_steps or self._goals.stops(self.outcome.standings)

    def _ends_phase(self) -> bool:
        """Whether what is trainable changes before the next step: this loop's model cannot go on then."""
        phase_at = self._cadence.phase_at
        return phase_at is not None and phase_at(self.outcome.steps, self.outcome.position[0]) != self._phase

    def _one_step(self) -> None:
        began = time.perf_counter()
        data = next(self._steps)
        waited = time.perf_counter() - began
        self._pulse.spent(waited)
        self._note(TRAINING)
        microbatches = [self._move(batch) for batch in data.microbatches]
        lr_scale = self._schedule(self.outcome.steps)
        self._world.aboard[:] = [self._agreement]
        result = train_step(self._engine, self._watched, microbatches, lr_scale, self._wait_for_copy)
        self._raise_if(self._watch.observe(self.outcome.steps, result.skipped, microbatches))
        self.outcome.steps += 1
        self.outcome.samples += data.num_samples
        self.outcome.position = data.end
        if self._after_step is not None:
            self._after_step(self.outcome.steps, result.skipped)
        self._spikes.observe(self.outcome.steps, result.loss, data.end)
        self._meter.step(data.num_samples, waited)
        self._after(result, data, lr_scale)
        self._agree()
        self._pulse.stepped(self.outcome.steps)
        self._pulse.phase = DATA

    def ask_to_stop(self) -> None:
        """Ask all ranks to save and leave at the next step boundary; any thread may."""
        self._agreement.wish_to_stop()

    def _note(self, phase: str) -> None:
        """Note what this rank does now; until its first step is done, it is starting."""
        if self._pulse.step:
            self._pulse.phase = phase

    def _agree(self) -> None:
        """What all ranks do at this step boundary."""
        if self._saver.is_late():
            self._agreement.wish_to_save()
        agreed = self._agreement.decide()
        self._saver.poll()
        if self._replicas.is_due(self.outcome.steps):
            self._replicas.compare(self.outcome.steps)
        if (agreed.save or self._is_best or self._saver.is_due(self.outcome.steps)) and not agreed.stop:
            self._save()
        self.outcome.num_skipped = self._watch.num_skipped
        is_left = not self._is_done()  # a run that has come to its end is done, whoever asks it to stop
        self.outcome.stopped, self.outcome.again = agreed.stop and is_left, agreed.again and is_left

    def _save(self) -> None:
        """Save a checkpoint, unless a step before it must not have been."""
        self._raise_if(self._watch.last())
        self._look_for_spikes()
        if self.spike:
            return
        self.outcome.num_skipped = self._watch.num_skipped
        self._note(SAVING)
        self._replicas.compare(self.outcome.steps)
        began = time.perf_counter()
        self._saver.save(self.outcome)
        self._meter.saved(time.perf_counter() - began)

    def _wait_for_copy(self) -> None:
        began = time.perf_counter()
        self._saver.wait_for_copy()
        self._meter.saved(time.perf_counter() - began)

    def _after(self, result: StepResult, data: TrainBatch, lr_scale: float) -> None:
        step, cadence = self.outcome.steps, self._cadence
        is_last = step == cadence.total_steps
        is_eval = self._eval_batches is not None and (is_last or self._is_time_to_evaluate(data))
        due = [hook for hook in self._hooks if step % hook.every == 0]
        if step % cadence.log_every == 0 or is_last:
            self._log(result, data.epoch, lr_scale, is_last=is_last)
            self._look_for_spikes()
        if is_eval:
            self.outcome.evaluation = self._evaluate(step, data.epoch)
        self._is_best = is_eval and self._goals.see(self.outcome.evaluation, step, self.outcome.standings)
        if due:
            lrs = [lr * lr_scale for lr in self._base_lrs]
            info = StepInfo(result, step, data.epoch, data.num_samples, self.outcome.samples, lrs)
            info.evaluation = self.outcome.evaluation if is_eval else None
            info.is_last = self._is_done() or self._ends_phase()
            for hook in due:
                hook.call(info)
            self._numbers_of_hooks.update(info.numbers)
            if info.stop_requested:
                self._agreement.wish_to_stop()
            if info.save_requested:
                self._agreement.wish_to_save()

    def _is_time_to_evaluate(self, data: TrainBatch) -> bool:
        steps, epochs = self._cadence.eval_every_steps, self._cadence.eval_every_epochs
        ends_epoch = data.end[0] > data.epoch
        return bool(steps and self.outcome.steps % steps == 0) or bool(
            epochs and ends_epoch and data.end[0] % epochs == 0
        )

    def _log(self, result: StepResult, epoch: int, lr_scale: float, *, is_last: bool) -> None:
        loss, norm = _numbers(result)
        row = {
            "step": self.outcome.steps,
            "epoch": epoch,
            "samples": self.outcome.samples,
            "loss": loss,
            "grad_norm": norm,
            "lr": [lr * lr_scale for lr in dict.fromkeys(self._base_lrs)],  # groups of one rate keep one rate
            **self._meter.row(is_last=is_last),
            **self._numbers_of_hooks,
        }
        self._numbers_of_hooks = {}
        self._tell(row)

    def _tell(self, row: dict[str, Any]) -> None:
        row = Row(row, time=round(time.time(), 3))
        for tracker in self._trackers:
            tracker.log(row)

    def _evaluate(self, step: int, epoch: int) -> dict[str, Any]:
        assert self._eval_batches is not None
        began = time.perf_counter()
        self._note(EVALUATING)
        batches = (self._move(batch) for batch in self._eval_batches())
        self.examples = Examples(self._task)
        may_be_last = step >= self._cadence.total_steps or self._goals.may_stop
        look = self.examples.look if self._world.is_main and may_be_last else None
        numbers = evaluate(self._engine, self._watched, batches, self._world, look)
        self._meter.pause(time.perf_counter() - began)  # throughput is that of training
        self._tell({"step": step, "epoch": epoch, **_scalars(numbers)})
        for doubt in self._doubts.about(numbers):
            self._tell({"step": step, "event": "warning", "text": doubt})
        return numbers

    def _raise_if(self, seen: Any) -> None:
        if seen is not None:
            engine, microbatch = self._engine, self._engine.microbatch
            ways = partial(microbatch, last=False), partial(microbatch, last=True)
            raise explain(seen, self._world, engine.model, self._task, *ways, self._backward_alone)

    def _backward_alone(self, batch: Batch) -> None:
        self._engine.backward(self._task.loss(self._engine.model, batch))


def _numbers(result: StepResult) -> tuple[float, float]:
    """Loss and norm, in the one transfer of a log interval."""
    if isinstance(result.loss, Tensor) and isinstance(result.norm, Tensor):
        loss, norm = torch.stack((result.loss, result.norm)).tolist()
        return loss, norm
    return float(result.loss), float(result.norm)


def _scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of an evaluation, by the names they are logged under."""
    plain = {
        name: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        for name, value in numbers.items()
    }
    return {f"eval/{name}": value for name, value in plain.items() if isinstance(value, (int, float))}
