"""The state of every engine at every world size, loaded into every other: bitwise equal, and it trains on alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.dist import join
from bigtrain.errors import StateError
from bigtrain.state import MemoryReader
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import IN_FULL, assert_same_state, build, everything, train, weights

PLACES = [
    ("single", 1),
    *(("ddp", n) for n in (1, 2, 4)),
    *(("fsdp", n) for n in (1, 2, 3, 4)),
    ("hsdp", 4),
    ("zero0", 2),
    *(("zero1", n) for n in (1, 3)),
    *(("zero2", n) for n in (2, 4)),
    *(("zero3", n) for n in (1, 2, 3, 4)),
]
OPTIMIZERS = (zoo.ADAMW, zoo.SGD, zoo.BF16_MOMENTS)
EVERY_CASE = list(itertools.product((False, True), OPTIMIZERS))  # frozen parts, optimizer
CASES = EVERY_CASE if IN_FULL else [(False, zoo.ADAMW), (True, zoo.SGD), (False, zoo.BF16_MOMENTS)]
BEFORE, AFTER = range(3), range(3, 6)


def train_and_keep(layout: str, folder: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        for frozen, optim in CASES:
            engine = build(layout, world, frozen=frozen, optim=optim, empty=False)
            train(engine, world, 2, BEFORE)
            state = everything(engine, world)
            if world.is_main:
                torch.save((state.tensors, state.hyper), f"{folder}/{_name(layout, world.size, frozen, optim)}")
            engine.close()


def load_from_all(layout: str, folder: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        for frozen, optim in CASES:
            reference, tail = _plain_run(frozen, optim)
            engine = build(layout, world, frozen=frozen, optim=optim, empty=False)
            train(engine, world, 1, range(10, 12))  # what was there before must not matter
            for source in _sources((layout, world.size)):
                case = f"{source} -> {layout} × {world.size}, frozen {frozen}, {optim['name']}"
                reader = MemoryReader(*torch.load(f"{folder}/{_name(*source, frozen, optim)}", weights_only=False))
                engine.load(reader)
                assert_same_state(everything(engine, world), reader, case)
                ours = train(engine, world, 2, AFTER)
                for mine, theirs in zip(ours, tail, strict=True):
                    assert max(map(zoo.relative, mine, theirs)) < 3e-6, case
                assert zoo.distance(weights(everything(engine, world)), reference) < 2e-5, case
            engine.close()


def _sources(target: tuple[str, int]) -> list[tuple[str, int]]:
    """Which states a place loads: its own, and three others such that each is loaded somewhere; or all of them."""
    own = PLACES.index(target)
    return PLACES if IN_FULL else [PLACES[(own + far) % len(PLACES)] for far in (0, 4, 9, 13)]


def _plain_run(frozen: bool, optim: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    model = zoo.make_odd(frozen, empty=False)
    seen, _ = zoo.plain_loop(model, AFTER.stop, optim=optim)
    return {name: p.detach() for name, p in model.named_parameters()}, seen[AFTER.start :]


def _name(layout: str, world_size: int, frozen: bool, optim: dict[str, Any]) -> str:
    return f"{layout}-{world_size}-{frozen}-{optim['name']}-{optim.get('moments', 'fp32')}.pt"


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for layout, world_size in PLACES:
        run_distributed(train_and_keep, world_size, layout, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size"), PLACES)
def test_loads_the_state_of_every_engine(states: Path, layout: str, world_size: int) -> None:
    run_distributed(load_from_all, world_size, layout, str(states))


def load_moments_of_the_other_dtype(layout: str) -> None:
    """A state with moments in float32 where they are kept in bfloat16, and the other way round: nothing is mixed."""
    with join("cpu", needs_group=layout != "single") as world:
        for ours, theirs in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            optim = {torch.float32: {**zoo.BF16_MOMENTS, "moments": "fp32"}, torch.bfloat16: zoo.BF16_MOMENTS}
            source = build(layout, world, optim=optim[theirs], empty=False)
            train(source, world, 2, BEFORE)
            state = everything(source, world)
            source.close()
            moments = [key for key in state.tensors if key[0].startswith("exp_avg")]
            assert moments
            assert {state.tensors[key].dtype for key in moments} == {theirs}
            engine = build(layout, world, optim=optim[ours], empty=False)
            engine.load(state)
            wanted = state.tensors | {key: state.tensors[key].to(ours) for key in moments}
            assert_same_state(everything(engine, world), MemoryReader(wanted, state.hyper), layout)
            train(engine, world, 2, AFTER)
            after = everything(engine, world)
            assert {after.tensors[key].dtype for key in moments} == {ours}
            engine.close()


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("fsdp", 2), ("zero0", 2), ("zero2", 2), ("zero3", 2)])
def test_moments_are_of_the_dtype_that_the_run_file_says(layout: str, world_size: int) -> None:
    run_distributed(load_moments_of_the_other_dtype, world_size, layout)


def refuse_what_does_not_fit(layout: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        engine = build(layout, world, empty=False)
        before = everything(engine, world)
        tensors = dict(before.tensors)
        tensors["weight", "mix"] = torch.zeros(4, zoo.WIDTH)
        tensors["weight", "renamed"] = tensors.pop(("weight", "temperature"))
        tensors["buffer", "shift"] = tensors["buffer", "shift"].double()
        with pytest.raises(StateError) as caught:
            engine.load(MemoryReader(tensors, before.hyper))
        told = (
            "missing: weight temperature",
            "extra: weight renamed",
            "different: weight mix",
            "different: buffer shift",
        )
        for wrong in told:
            assert wrong in str(caught.value)
        assert_same_state(everything(engine, world), before)


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("fsdp", 2), ("zero2", 2), ("zero3", 2)])
def test_lists_everything_that_does_not_fit_and_loads_nothing(layout: str, world_size: int) -> None:
    run_distributed(refuse_what_does_not_fit, world_size, layout)


def groups_keep_their_own_hyperparameters(layout: str) -> None:
    """One group's numbers must not be copied over another's."""
    with join("cpu", needs_group=layout != "single") as world:
        source = build(layout, world, empty=False)
        other = {"name": "adamw", "lr": 1.0, "groups": [{"match": "layers.1.*", "lr": 2.0}]}
        target = build(layout, world, empty=False, optim=other)
        train(source, world, 1, range(2))
        target.load(everything(source, world))
        rates = {name: hyper["lr"] for name, hyper in target.state().hyper.items()}
        assert rates["layers.1.up.weight"] == 1e-2
        assert rates["mix"] == 3e-3
        assert target.state().hyper["mix"]["weight_decay"] == 0.1
        assert target.state().hyper["layers.1.up.bias"]["weight_decay"] == 0.0


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)])
def test_groups_keep_their_own_hyperparameters(layout: str, world_size: int) -> None:
    run_distributed(groups_keep_their_own_hyperparameters, world_size, layout)
