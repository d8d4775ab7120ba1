"""Every engine, world size, accumulation, frozen part and precision against a loop of plain torch.

One spawn for each (engine, world); the other axes run inside it.
"""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch

from bigtrain.dist import join
from bigtrain.loop import train_step
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import IN_FULL, assert_same_state, build, everything, train, weights

LAYOUTS = [
    ("single", 1),
    ("hsdp", 4),
    *itertools.product(("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"), (1, 2, 4)),
]
STEPS = 8
# Rounding alone: measured floors are 3e-7 (loss, norm) and 3e-6 (parameters) in float32.
TOLERANCE = {torch.float32: (2e-6, 2e-5), torch.float64: (1e-13, 1e-12)}
KEPT_ALIKE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
SHARP = torch.float64
PLAIN = torch.float32

# Accumulation, frozen parts, precision, optimizer: every pair of values of every two axes.
PAIRS = [
    (1, False, PLAIN, zoo.ADAMW),
    (1, True, SHARP, zoo.SGD),
    (3, False, SHARP, zoo.ADAMW),
    (3, True, PLAIN, zoo.SGD),
    (3, True, SHARP, zoo.ADAMW),
    (1, False, PLAIN, zoo.SGD),
    (3, False, SHARP, zoo.BF16_MOMENTS),
    (1, True, PLAIN, zoo.BF16_MOMENTS),
]
OPTIMIZERS = (zoo.ADAMW, zoo.SGD, zoo.BF16_MOMENTS)
ALL = list(itertools.product((1, 3), (False, True), (PLAIN, SHARP), OPTIMIZERS))


def compare_with_plain(layout: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        for accumulation, frozen, dtype, optim in ALL if IN_FULL else PAIRS:
            if layout.startswith("zero"):
                dtype = PLAIN  # DeepSpeed reduces no float64
            empty = layout != "zero3"
            engine = build(layout, world, frozen=frozen, dtype=dtype, optim=optim, empty=empty)
            before = weights(everything(engine, world))
            ours = train(engine, world, accumulation, range(STEPS))
            reader = everything(engine, world)
            plain = zoo.make_odd(frozen, dtype, empty)
            theirs, _ = zoo.plain_loop(plain, STEPS, optim=optim)
            case = f"{layout} × {world.size}, accumulation {accumulation}, frozen {frozen}, {dtype}, {optim}"
            tolerance, parameter_tolerance = TOLERANCE[dtype]
            for step, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
                assert zoo.relative(mine[0], reference[0]) < tolerance, f"{case}: loss of step {step}"
                assert zoo.relative(mine[1], reference[1]) < tolerance, f"{case}: norm of step {step}"
            kept_in = torch.bfloat16 if "moments" in optim else dtype
            assert {t.dtype for (kind, _), t in reader.tensors.items() if kind in KEPT_ALIKE} == {kept_in}, case
            trained = dict(plain.named_parameters())
            reference = {n: p.detach() for n, p in trained.items()}
            assert zoo.distance(weights(reader), reference) < parameter_tolerance, case
            for name, p in trained.items():
                moves = p.requires_grad and p.numel() > 0
                assert torch.equal(weights(reader)[name], before[name]) != moves, f"{case}: {name}"
            assert torch.equal(reader.tensors["buffer", "shift"], plain.shift)
            assert ("buffer", "scratch") not in reader.tensors
            engine.close()


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_same_as_plain_torch(layout: str, world_size: int) -> None:
    run_distributed(compare_with_plain, world_size, layout)


def compare_in_bf16(layout: str) -> None:
    """The first step is sharp; after it bf16 is chaotic, and only the distance from float32 can be compared."""
    with join("cpu", needs_group=layout != "single") as world:
        for accumulation, frozen, optim in ((1, False, zoo.ADAMW), (3, True, zoo.ADAMW), (1, True, zoo.SGD)):
            empty = layout != "zero3"
            engine = build(layout, world, frozen=frozen, optim=optim, compute=torch.bfloat16, empty=empty)
            ours = train(engine, world, accumulation, range(20))
            rounded, exact = zoo.make_odd(frozen, empty=empty), zoo.make_odd(frozen, empty=empty)
            theirs, _ = zoo.plain_loop(rounded, 20, optim=optim, bf16_parts=(world.size, accumulation))
            zoo.plain_loop(exact, 20, optim=optim)
            case = f"{layout} × {world.size}, accumulation {accumulation}, frozen {frozen}, {optim['name']}"
            assert zoo.relative(ours[0][0], theirs[0][0]) < 1e-6, case
            assert zoo.relative(ours[0][1], theirs[0][1]) < 1e-5, case
            reference = {n: p.detach() for n, p in exact.named_parameters()}
            floor = zoo.distance({n: p.detach() for n, p in rounded.named_parameters()}, reference)
            kept = weights(everything(engine, world))
            assert 0 < zoo.distance(kept, reference) < 1.5 * floor, case
            assert all(tensor.dtype == torch.float32 for tensor in kept.values())
            engine.close()


@pytest.mark.parametrize(("layout", "world_size"), [place for place in LAYOUTS if place[0] != "zero0"])
def test_bf16_is_the_same_everywhere(layout: str, world_size: int) -> None:
    run_distributed(compare_in_bf16, world_size, layout)


def compare_an_update_of_whole_parameters(layout: str) -> None:
    with join("cpu", needs_group=True) as world:
        engine = build(layout, world, optim=zoo.NORMALISED)
        ours = train(engine, world, 2, range(STEPS))
        plain = zoo.make_odd()
        theirs, _ = zoo.plain_loop(plain, STEPS, optim=zoo.NORMALISED)
        tolerance, parameter_tolerance = TOLERANCE[torch.float32]
        for mine, exact in zip(ours, theirs, strict=True):
            assert max(map(zoo.relative, mine, exact)) < tolerance
        reference = {name: p.detach() for name, p in plain.named_parameters()}
        assert zoo.distance(weights(everything(engine, world)), reference) < parameter_tolerance
        engine.close()


@pytest.mark.parametrize(("layout", "world_size"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_an_optimizer_that_needs_whole_parameters(layout: str, world_size: int) -> None:
    run_distributed(compare_an_update_of_whole_parameters, world_size, layout)


def compare_with_recomputation(layout: str) -> None:
    """Activation checkpointing changes nothing: bit for bit in what one rank computes itself."""
    with join("cpu", needs_group=layout != "single") as world:
        finals = {}
        for recompute in ("none", "full", "ops", 2):
            engine = build(layout, world, recompute=recompute, empty=layout != "zero3")
            train(engine, world, 2, range(4))
            finals[recompute] = everything(engine, world)
            engine.close()
        for recompute in ("full", "ops", 2):
            assert_same_state(finals[recompute], finals["none"], f"{layout}, {recompute}")


@pytest.mark.parametrize(
    ("layout", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("zero1", 2), ("zero3", 2)]
)
def test_activation_checkpointing_changes_nothing(layout: str, world_size: int) -> None:
    run_distributed(compare_with_recomputation, world_size, layout)


def evaluation_leaves_no_trace(layout: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        finals = []
        for evaluates in (False, True):
            engine = build(layout, world, empty=False)
            for step in range(4):
                train(engine, world, 2, range(step, step + 1))
                if evaluates:
                    with engine.evaluating():
                        assert not engine.model.training
                        for batch in zoo.my_microbatches(step, world.rank, world.size, 2):
                            zoo.OddTask().loss(engine.model, batch)
                    assert engine.model.training
            finals.append(everything(engine, world))
        assert_same_state(*finals)


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2)])
def test_evaluation_leaves_no_trace(layout: str, world_size: int) -> None:
    run_distributed(evaluation_leaves_no_trace, world_size, layout)


def skip_one_step(layout: str, optim: dict[str, Any], compiles: bool) -> None:
    """A NaN on one rank: nobody's weights, moments or counters move, and training goes on as if it had not been."""
    with join("cpu", needs_group=layout != "single") as world:
        engine, clean = (
            build(layout, world, optim=optim, empty=False, compiles_updates=compiles) for _ in range(2)
        )
        for step in range(4):
            batches = zoo.my_microbatches(step, world.rank, world.size, 2)
            if step in (0, 2):
                before = everything(engine, world)
                task = _Poisoned() if world.rank == world.size - 1 else zoo.OddTask()
                assert train_step(engine, task, batches, 1.0).skipped, f"step {step}"
                after = everything(engine, world)
                fresh = {key: after.tensors.pop(key) for key in after.tensors.keys() - before.tensors.keys()}
                assert not any(tensor.any() for tensor in fresh.values())  # moments that begin at zero may exist
                assert_same_state(after, before)
            train(engine, world, 2, range(step, step + 1))
            train(clean, world, 2, range(step, step + 1))
        assert_same_state(everything(engine, world), everything(clean, world))


class _Poisoned(zoo.OddTask):
    def loss(self, model: torch.nn.Module, batch: Any) -> Any:
        result = super().loss(model, batch)
        return result._replace(total=result.total * float("nan"))


@pytest.mark.parametrize(
    ("optim", "compiles"),
    [(zoo.ADAMW, False), (zoo.SGD, False), (zoo.BF16_MOMENTS, False), (zoo.BF16_MOMENTS, True)],
    ids=["adamw", "sgd", "moments in bf16", "compiled moments in bf16"],
)
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_a_step_that_is_not_finite_changes_nothing(
    layout: str, world_size: int, optim: dict[str, Any], compiles: bool
) -> None:
    run_distributed(skip_one_step, world_size, layout, optim, compiles)


def compare_compiled(layout: str) -> None:
    """Compiled blocks give the same numbers, in as many graphs as there are modes: training, evaluation."""
    with join("cpu", needs_group=layout != "single") as world:
        finals = []
        warnings.simplefilter("ignore")  # those of torch itself, while it compiles
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            engine = build(layout, world, recompute="full", compiled=compiled, empty=False)
            if layout == "zero3":
                engine.model.module.order = (0, 1, 2, 3)
            train(engine, world, 2, range(2))
            finals.append(everything(engine, world))
            if compiled:
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
                with torch._dynamo.config.patch(error_on_recompile=True):
                    train(engine, world, 2, range(2, 4))
                assert not torch._dynamo.utils.counters["graph_break"]
            engine.close()
        assert zoo.distance(weights(finals[1]), weights(finals[0])) < 1e-6


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_compiled_blocks(layout: str, world_size: int) -> None:
    run_distributed(compare_compiled, world_size, layout)


def build_and_close(layout: str) -> None:
    """Twenty engines after one another leave nothing behind, and each trains alike."""
    with join("cpu", needs_group=True) as world:
        first, grown = None, []
        for number in range(20):
            engine = build(layout, world, empty=False)
            losses = train(engine, world, 2, range(2))
            first = first or losses
            assert losses == first
            model = weakref.ref(engine.model)
            engine.close()
            del engine
            gc.collect()
            assert model() is None, f"engine {number} is still there"
            objects = gc.get_objects()  # without what was imported before the rank began
            assert not any(type(o) is torch.nn.Parameter for o in objects), f"parameters of engine {number}"
            grown.append((len(torch.distributed.distributed_c10d._world.pg_map), len(objects)))
        assert grown[-1][0] == grown[1][0]  # process groups
        assert (grown[-1][1] - grown[4][1]) / 15 < 100  # a seed alone leaves some: torch keeps them for other devices


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_an_engine_can_be_built_and_closed_many_times(layout: str) -> None:
    run_distributed(build_and_close, 2, layout)
