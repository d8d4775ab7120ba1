"""DeepSpeed: offloading, and what cannot be had with it: refused before anything starts, and it still fails."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigtrain.config import combinations
from bigtrain.dist import join
from bigtrain.engines import deepspeed, deepspeed_config
from bigtrain.engines.base import Zero
from bigtrain.errors import CombinationError, RankError, SetupError
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import assert_same_state, build, everything, train, weights

STEPS = 6


def offload(layout: str, zero: Zero) -> None:
    """The same as plain torch, and the state goes to another engine and back, bit for bit."""
    with join("cpu", needs_group=True) as world:
        offloaded = build(layout, world, zero=zero, empty=False)
        ours = train(offloaded, world, 2, range(STEPS))
        plain = zoo.make_odd(empty=False)
        theirs, _ = zoo.plain_loop(plain, STEPS)
        for mine, exact in zip(ours, theirs, strict=True):
            assert max(map(zoo.relative, mine, exact)) < 1e-5
        reference = {name: p.detach() for name, p in plain.named_parameters()}
        assert zoo.distance(weights(everything(offloaded, world)), reference) < 1e-5
        other = build("fsdp", world, empty=False)
        other.load(everything(offloaded, world))
        train(other, world, 1, range(2))
        reader = everything(other, world)
        offloaded.load(reader)
        assert_same_state(everything(offloaded, world), reader)
        for mine, exact in zip(train(offloaded, world, 2, range(3)), train(other, world, 2, range(3)), strict=True):
            assert max(map(zoo.relative, mine, exact)) < 1e-5
        offloaded.close()


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        ("zero1", Zero(offload_optimizer=True)),
        ("zero2", Zero(offload_optimizer=True)),
        ("zero3", Zero(offload_optimizer=True, offload_params=True)),
    ],
)
def test_offloading_changes_nothing(layout: str, zero: Zero) -> None:
    run_distributed(offload, 2, layout, zero, timeout_s=600)  # DeepSpeed compiles its Adam at the first use


def extra_is_passed_through() -> None:
    with join("cpu", needs_group=True) as world:
        zero = Zero(extra={"zero_optimization": {"reduce_bucket_size": 77, "overlap_comm": False}})
        engine = build("zero2", world, zero=zero)
        assert engine.model._config.zero_config.reduce_bucket_size == 77
        (loss, norm), *_ = train(engine, world, 2, range(1))
        (reference, reference_norm), *_ = zoo.plain_loop(zoo.make_odd(), 1)[0]
        assert zoo.relative(loss, reference) < 2e-6
        assert zoo.relative(norm, reference_norm) < 2e-6


def test_extra_is_passed_through() -> None:
    run_distributed(extra_is_passed_through, 2)


def count_messages(layout: str) -> None:
    """Everything small that a step sums goes in one message, where DeepSpeed itself sends one for each group."""
    with join("cpu", needs_group=True) as world:
        engine = build(layout, world, empty=False)
        assert len(engine._optimizer.param_groups) > 1
        train(engine, world, 1, range(1))
        small: list[int] = []
        send = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            small.extend([tensor.numel()] if tensor.numel() < 10 else [])
            return send(tensor, *args, **options)

        dist.all_reduce = counted
        try:
            train(engine, world, 2, range(1, 2))
        finally:
            dist.all_reduce = send
        assert small == [len(engine._optimizer.param_groups) + 2]  # norms, loss and count


@pytest.mark.parametrize("layout", ["zero1", "zero2", "zero3"])
def test_norms_loss_and_count_are_one_message(layout: str) -> None:
    run_distributed(count_messages, 2, layout)


def step_without_norms() -> None:
    with join("cpu", needs_group=True) as world:
        engine = build("zero2", world, empty=False)
        del engine._zero.get_grad_norm_direct  # as of a version that sums them otherwise
        train(engine, world, 1, range(1))


def test_a_version_that_asks_for_no_norms_is_refused() -> None:
    with pytest.raises(SetupError, match="took a step without asking for the norm of the gradients"):
        run_distributed(step_without_norms, 1)


def no_trace_of_unused(layout: str) -> None:
    with join("cpu", needs_group=True) as world:
        engine = build(layout, world, empty=False)
        engine.model.module.order = (0, 1, 2)  # layers.3 takes no part
        train(engine, world, 1, range(1))


@pytest.mark.parametrize("layout", ["zero0", "zero2", "zero3"])
def test_parameters_that_take_no_part_are_refused(layout: str) -> None:
    """Plain torch leaves them alone; DeepSpeed would decay them."""
    with pytest.raises(CombinationError, match=r"take no part in the loss: layers.3.down.bias"):
        run_distributed(no_trace_of_unused, 1, layout)


# What is refused: which layout, how it is built, what the refusal says; and what comes of it without the refusal.
CANNOT: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bf16 in stage 0": ("zero0", {"compute": torch.bfloat16}, "does not add up bf16", "NotImplementedError"),
    "float64": ("zero0", {"dtype": torch.float64}, "reduces no gradients of float64", "unsupported grad type"),
    "no elements in stage 3": ("zero3", {"empty": True}, "parameters without elements: nothing", "KeyError"),
    "whole parameters": ("zero2", {"optim": zoo.NORMALISED}, "may need whole parameters", "other numbers"),
    "another optimizer on the host": (
        "zero2",
        {"optim": zoo.SGD, "zero": Zero(offload_optimizer=True)},
        "by its own Adam, and the optimizer is SGD",
        "ZeRORuntimeException",
    ),
    "moments in bf16 on the host": (
        "zero2",
        {"optim": zoo.BF16_MOMENTS, "zero": Zero(offload_optimizer=True)},
        "keeps its moments in float32",
        "ZeRORuntimeException",
    ),
    "round robin": (
        "zero2",
        {"zero": Zero(extra={"zero_optimization": {"round_robin_gradients": True}})},
        "masters then do not lie where",
        "state is another",
    ),
}


def build_and_train(layout: str, options: dict[str, Any], is_checked: bool) -> None:
    if not is_checked:
        deepspeed_config.check = lambda *args: None  # type: ignore[assignment]
        combinations.REFUSED.clear()
        deepspeed.host_adam = lambda plan, tensors: plan.build(tensors)  # type: ignore[assignment]
    with join("cpu", needs_group=True) as world:
        options = {"empty": layout != "zero3", **options}
        engine = build(layout, world, **options)
        ours = train(engine, world, 1, range(3))
        if options.get("optim") == zoo.NORMALISED:
            theirs, _ = zoo.plain_loop(zoo.make_odd(), 3, optim=zoo.NORMALISED)
            assert zoo.relative(ours[2][0], theirs[2][0]) < 1e-5, "other numbers"
        if "zero" in options and options["zero"].extra:
            model = {name: p.detach().clone() for name, p in engine.model.module.named_parameters()}
            kept = weights(everything(engine, world))
            assert all(torch.equal(model[name], tensor) for name, tensor in kept.items()), "state is another"


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_is_refused(name: str) -> None:
    layout, options, said, _ = CANNOT[name]
    with pytest.raises(CombinationError, match=said) as caught:
        run_distributed(build_and_train, 2, layout, options, True)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CANNOT)
def test_it_still_fails_underneath(name: str) -> None:
    """The day one of these passes, the refusal can go."""
    layout, options, _, failure = CANNOT[name]
    with pytest.raises(RankError, match=failure):
        run_distributed(build_and_train, 2, layout, options, False)


def compile_what_runs_twice() -> None:
    warnings.simplefilter("ignore")  # those of torch itself, while it compiles
    with join("cpu", needs_group=True) as world:
        engine = build("zero3", world, compiled=True, empty=False)
        engine.model.module.order = (0, 1, 1, 2, 3)
        train(engine, world, 1, range(1))


def test_weights_on_the_host_need_stage_3() -> None:
    """DeepSpeed would leave the key aside without a word."""
    with pytest.raises(CombinationError, match="offload_params needs stage 3"):
        run_distributed(build_and_train, 1, "zero2", {"zero": Zero(offload_params=True)}, True)


@pytest.mark.compiler
@pytest.mark.slow
def test_a_compiled_block_that_runs_twice_still_fails_underneath() -> None:
    with pytest.raises(RankError, match="AssertionError"):
        run_distributed(compile_what_runs_twice, 2)


def train_twice_in_one_process() -> None:
    """As in a notebook: the first group is gone when the second engine comes."""
    found = []
    for _ in range(2):
        with join("cpu", needs_group=True) as world:
            engine = build("zero2", world)
            found.append(train(engine, world, 1, range(2)))
            engine.close()
    assert found[0] == found[1]


def test_trains_twice_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    train_twice_in_one_process()
