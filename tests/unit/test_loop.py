"""Steps, evaluation, hooks, stopping, numbers that are not finite: one process, against plain torch."""

import math
import os
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import World
from bigtrain.engines import Choices, Engine
from bigtrain.errors import NonFiniteError
from bigtrain.loop import Loop, evaluate, train_step
from bigtrain.moving import moved
from bigtrain.optim import plan_optimizer
from bigtrain.progress import Cadence, Hook, StepInfo
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.regression import Regression

SAMPLES, CLIP = 11, 0.05
OPTIM = {"lr": 1e-2, "weight_decay": 0.1}


class StepData(NamedTuple):
    microbatches: list[Batch]
    epoch: int
    num_samples: int
    end: tuple[int, int]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 2)).double()


def make_engine(model: nn.Module, clip: float | None = CLIP) -> Engine:
    plan = plan_optimizer(model, schema.Optim.model_validate(OPTIM))
    return engines.build("single", model, [], plan, World(), Choices(clip_grad_norm=clip))


def samples(step: int, n: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(n, 2, generator=generator, dtype=torch.float64)


def make_batch(inputs: Tensor, targets: Tensor, num_valid: int | None = None, first: int = 0) -> Batch:
    valid = len(targets) if num_valid is None else num_valid
    weight = (torch.arange(len(targets)) < valid).float()
    return Batch((inputs, targets), weight, valid, range(first, first + len(targets)))


def microbatches(step: int, sizes: tuple[int, ...] = (SAMPLES,)) -> list[Batch]:
    """The samples of a step, 100 a step in the dataset's numbers, cut into parts."""
    parts, first = [], 0
    for size in sizes:
        inputs, targets = (t[first : first + size] for t in samples(step))
        parts.append(make_batch(inputs, targets, first=100 * step + first))
        first += size
    return parts


def endless(change: Callable[[int, list[Batch]], None] = lambda step, batches: None) -> Iterator[StepData]:
    """Steps of four an epoch."""
    step = 0
    while True:
        batches = microbatches(step, (6, 5))
        change(step, batches)
        yield StepData(batches, step // 4, SAMPLES, divmod(step + 1, 4))
        step += 1


class Rows:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def close(self) -> None: ...


def make_loop(model: nn.Module, total: int = 5, **changes: Any) -> Loop:
    given: dict[str, Any] = {
        "engine": make_engine(model),
        "task": Regression(),
        "world": World(),
        "steps": endless(),
        "eval_batches": None,
        "schedule": lambda step: 1 / (1 + step),
        "base_lrs": [OPTIM["lr"]],
        "cadence": Cadence(total, log_every=1000),
        "trackers": [],
        "hooks": [],
        "on_nonfinite": "stop",
        "move": lambda batch: batch,
    }
    return Loop(**{**given, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def plain_steps(model: nn.Module, steps: int, schedule: Callable[[int], float]) -> list[tuple[float, float]]:
    """The same training as a script would write it: whole batches, the mean loss."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIM["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    )
    seen = []
    for step in range(steps):
        inputs, targets = samples(step)
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = OPTIM["lr"] * schedule(step)
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return seen


# ------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("sizes", [(11,), (6, 5), (1, 9, 1)])
def test_train_step_is_plain_torch(sizes):
    ours, plain = make_model(), make_model()
    engine = make_engine(ours)
    factor = lambda step: 0.5 ** (step % 3)  # noqa: E731
    seen = [train_step(engine, Regression(), microbatches(step, sizes), factor(step)) for step in range(6)]
    for result, (loss, norm) in zip(seen, plain_steps(plain, 6, factor), strict=True):
        assert float(result.loss) == pytest.approx(loss, rel=1e-12)
        assert float(result.norm) == pytest.approx(norm, rel=1e-12)
        assert norm > CLIP  # so that clipping is part of what is compared
        assert not result.skipped
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_samples_of_weight_0_change_nothing():
    ours, plain = make_model(), make_model()
    filled = microbatches(0, (6, 5))
    inputs, targets = filled[1].data
    filled[1] = make_batch(torch.cat([inputs, inputs[:1] + 7]), torch.cat([targets, targets[:1]]), num_valid=5)
    only_filler = make_batch(inputs[:2], targets[:2], num_valid=0)
    expected = train_step(make_engine(plain), Regression(), microbatches(0, (6, 5)), 1.0)
    result = train_step(make_engine(ours), Regression(), [*filled, only_filler], 1.0)
    assert (float(result.loss), float(result.norm)) == (float(expected.loss), float(expected.norm))
    assert_equal(weights(ours), weights(plain))


# ---------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_the_mean_over_what_counts():
    model = nn.Sequential(make_model(), nn.Dropout(0.9)).double()
    engine = make_engine(model)
    inputs, targets = samples(1)
    far_off = torch.full((2, 3), 1e6, dtype=torch.float64)
    batches = [
        make_batch(inputs[:4], targets[:4]),
        make_batch(torch.cat([inputs[4:], far_off]), torch.cat([targets[4:], targets[:2]]), num_valid=7),
        make_batch(far_off, targets[:2], num_valid=0),
    ]
    before = weights(model)
    numbers = evaluate(engine, Regression(), batches, World())
    errors = model[0](inputs).detach() - targets
    assert numbers["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-12)
    assert numbers["mse"] == pytest.approx(numbers["loss"], rel=1e-12)
    assert numbers["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-12)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert_equal(weights(model), before)


def test_an_evaluation_of_nothing_has_no_loss():
    filler = make_batch(*samples(0), num_valid=0)
    assert math.isnan(evaluate(make_engine(make_model()), Regression(), [filler], World())["loss"])


def test_evaluations_and_log_lines_come_when_they_are_due():
    tracker, told = Rows(), []
    inputs, targets = samples(99)
    loop = make_loop(
        make_model(),
        total=7,
        cadence=Cadence(7, log_every=3, eval_every_steps=2),
        eval_batches=lambda: [make_batch(inputs, targets)],
        trackers=[tracker],
        hooks=[Hook(lambda info: told.append((info.step, info.evaluation)))],
    )
    outcome = loop.run()
    lines = [row for row in tracker.rows if "loss" in row]
    evaluations = [row for row in tracker.rows if "eval/loss" in row]
    assert [row["step"] for row in lines] == [3, 6, 7]
    assert [row["epoch"] for row in lines] == [0, 1, 1]
    assert [row["samples"] for row in lines] == [33, 66, 77]
    assert [row["lr"] for row in lines] == [[pytest.approx(OPTIM["lr"] / step)] for step in (3, 6, 7)]
    assert [row["step"] for row in evaluations] == [2, 4, 6, 7]  # and at the end
    assert [step for step, evaluation in told if evaluation is not None] == [2, 4, 6, 7]
    assert outcome.evaluation == told[-1][1]
    assert outcome.evaluation["loss"] == evaluations[-1]["eval/loss"]


# --------------------------------------------------------------------------------------------- hooks and stopping


def test_hooks_are_told_what_happened():
    told: dict[int, StepInfo] = {}
    plain = make_model()
    expected = plain_steps(plain, 5, lambda step: 1 / (1 + step))
    loop = make_loop(make_model(), hooks=[Hook(lambda info: told.update({info.step: info}))])
    outcome = loop.run()
    assert (outcome.steps, outcome.samples, outcome.stopped) == (5, 55, False)
    assert list(told) == [1, 2, 3, 4, 5]
    for (step, info), (loss, norm) in zip(told.items(), expected, strict=True):
        assert info.loss == pytest.approx(loss, rel=1e-10)
        assert info.grad_norm == pytest.approx(norm, rel=1e-10)
        assert (info.epoch, info.num_samples, info.samples_seen) == ((step - 1) // 4, SAMPLES, SAMPLES * step)
        assert info.lr == [pytest.approx(OPTIM["lr"] / step)]
        assert info.evaluation is None


def test_every_nth_step_in_the_order_of_the_hooks():
    called: list[tuple[str, int]] = []
    hooks = [
        Hook(lambda info: called.append(("third", info.step)), every=3),
        Hook(lambda info: called.append(("second", info.step)), every=2),
    ]
    make_loop(make_model(), total=6, hooks=hooks).run()
    assert called == [("second", 2), ("third", 3), ("second", 4), ("third", 6), ("second", 6)]


def test_a_hook_may_stop_the_run():
    model, shorter = make_model(), make_model()
    loop = make_loop(model, total=9, hooks=[Hook(lambda info: info.stop(), every=3)])
    outcome = loop.run()
    assert (outcome.steps, outcome.samples, outcome.stopped) == (3, 33, True)
    make_loop(shorter, total=3).run()
    assert_equal(weights(model), weights(shorter))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_boundary_and_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    steps: list[int] = []

    def send(info: StepInfo) -> None:
        if info.step == 2:
            os.kill(os.getpid(), number)
        steps.append(info.step)  # the step is brought to its end

    outcome = make_loop(make_model(), hooks=[Hook(send)]).run()
    assert (outcome.steps, outcome.stopped, steps) == (2, True, [1, 2])
    assert {n: signal.getsignal(n) for n in before} == before


class Sending(Regression):
    """Sends a signal to this process in the backward pass of the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        self.calls += 1
        result = super().loss(model, batch)
        if self.calls == 5:  # each step has two microbatches
            result.total.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
        return result


def test_a_signal_in_a_backward_pass_or_while_data_are_waited_for():
    in_backward = make_loop(make_model(), task=Sending()).run()
    assert (in_backward.steps, in_backward.stopped) == (3, True)

    def slowly(step: int, batches: list[Batch]) -> None:
        if step == 2:
            timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            timer.start()
            time.sleep(0.5)  # the wait is brought to its end, and the step as well

    waiting = make_loop(make_model(), steps=endless(slowly)).run()
    assert (waiting.steps, waiting.stopped) == (3, True)


@pytest.fixture
def _heeds_interrupts():
    """A shell starts what it puts into the background with SIGINT ignored."""
    came_with = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, came_with)


@pytest.mark.usefixtures("_heeds_interrupts")
def test_a_second_signal_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGINT)
    after_it: list[int] = []

    def send_twice(info: StepInfo) -> None:
        # To this thread: of two that come to another one at once, Python makes one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        after_it.append(info.step)

    with pytest.raises(KeyboardInterrupt):
        make_loop(make_model(), hooks=[Hook(send_twice)]).run()
    assert not after_it
    assert signal.getsignal(signal.SIGINT) is before


# ----------------------------------------------------------------------------------------- numbers not finite


def spoil(wanted: int, value: float = math.nan) -> Callable[[int, list[Batch]], None]:
    """Spoil the second sample of the second microbatch of a step."""

    def change(step: int, batches: list[Batch]) -> None:
        if step == wanted:
            batches[1].data[1][1, 0] = value

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(value):
    model, shorter = make_model(), make_model()
    loop = make_loop(model, steps=endless(spoil(2, value)))
    with pytest.raises(NonFiniteError) as caught:
        loop.run()
    assert "the loss is not finite in step 3" in caught.value.problem
    assert caught.value.where == "rank 0: samples 206, 207, 208, 209, 210"  # the microbatch it was in
    assert "health.on_nonfinite=skip" in caught.value.remedy
    assert loop.outcome.steps == 2
    make_loop(shorter, total=2).run()
    assert_equal(weights(model), weights(shorter))


class Root:
    """A finite loss whose gradient is not."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        return LossSum((model(batch.data[0]) * 0).sum().sqrt(), 1.0)


def test_a_gradient_that_is_not_finite_is_told_apart():
    model = make_model()
    before = weights(model)
    with pytest.raises(NonFiniteError) as caught:
        make_loop(model, task=Root()).run()
    assert "the gradient is not finite, though the loss is in step 1" in caught.value.problem
    assert caught.value.where.startswith("rank 0: ")
    assert "weight" in caught.value.where
    assert ", samples 0, 1, 2, 3, 4, 5" in caught.value.where
    assert_equal(weights(model), before)


class RootOfTheSecond(Root):
    """Its gradient is not finite for one sample alone."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        good = LossSum((model(batch.data[0]) ** 2).sum(), 1.0)
        return super().loss(model, batch) if 206 in batch.indices else good


def test_the_microbatch_and_the_parameters_of_a_bad_gradient_are_named():
    with pytest.raises(NonFiniteError) as caught:
        make_loop(make_model(), task=RootOfTheSecond()).run()
    assert "in step 3" in caught.value.problem
    assert caught.value.where.endswith(", samples 206, 207, 208, 209, 210")


def test_a_step_that_is_skipped_leaves_no_trace_but_its_number():
    model, without = make_model(), make_model()
    loop = make_loop(
        model, total=4, steps=endless(spoil(1)), on_nonfinite="skip", schedule=lambda step: [1.0, 9.0, 0.5, 0.25][step]
    )
    outcome = loop.run()
    assert (outcome.steps, outcome.num_skipped) == (4, 1)
    good = (StepData(microbatches(step, (6, 5)), 0, SAMPLES, (0, 0)) for step in (0, 2, 3))
    make_loop(without, total=3, steps=good, schedule=lambda step: [1.0, 0.5, 0.25][step]).run()
    assert_equal(weights(model), weights(without))


# -------------------------------------------------------------------------------------------------------- moving


def test_only_floating_tensors_are_cast():
    pair = namedtuple("pair", "image label")
    data = {
        "floats": torch.ones(2),
        "half": torch.ones(2, dtype=torch.float16),
        "integers": torch.arange(2),
        "mask": torch.tensor([True, False]),
        "nested": [(torch.ones(2), "name"), pair(torch.ones(2), torch.arange(2))],
    }
    batch = Batch(data, torch.tensor([1.0, 0.0]), 1, [4, 5])
    result = moved(batch, torch.device("cpu"), torch.float64)
    assert {key: result.data[key].dtype for key in ("floats", "half", "integers", "mask")} == {
        "floats": torch.float64,
        "half": torch.float64,
        "integers": torch.int64,
        "mask": torch.bool,
    }
    (floats, name), named = result.data["nested"]
    assert (floats.dtype, name) == (torch.float64, "name")
    assert isinstance(named, pair)
    assert (named.image.dtype, named.label.dtype) == (torch.float64, torch.int64)
    assert torch.equal(named.label, torch.arange(2))
    assert result.weight.dtype == torch.float32
    assert (result.num_valid, result.indices) == (1, [4, 5])
    assert data["floats"].dtype == torch.float32
