"""Moving averages of weights under every engine: against plain torch, out of the way, and bitwise from any to any."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bigtrain
from bigtrain.checkpoint import find, open_checkpoint
from bigtrain.dist import join
from bigtrain.engines.averaging import Averaged
from bigtrain.errors import DivergedError, StateError
from bigtrain.health.replicas import Replicas
from bigtrain.loop import evaluate, train_step
from bigtrain.state import MemoryReader, whole
from tests.dist.test_resuming import values
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import assert_same_state, build, everything, train

LAYOUTS = [("single", 1), ("ddp", 2), ("hsdp", 4), ("fsdp", 2), ("fsdp", 3), *((f"zero{n}", 2) for n in range(4))]
DECAY, STEPS = 0.8, 6


def averaged(layout, world, *, frozen=True, evaluates=True, **options):
    engine = build(layout, world, frozen=frozen, empty=False, **options)
    names = [*engine.state().hyper, "shift"]
    return Averaged(engine, names, DECAY, evaluates=evaluates)


def steps(engine, world, numbers):
    for step in numbers:
        batches = zoo.my_microbatches(step, world.rank, world.size, 2)
        engine.update(step + 1, train_step(engine, zoo.OddTask(), batches, zoo.lr_factor(step)).skipped)


def averages(reader: MemoryReader) -> dict[str, Tensor]:
    return {name: tensor for (kind, name), tensor in reader.tensors.items() if kind == "ema"}


def plain_averages() -> tuple[dict[str, Tensor], zoo.Odd]:
    """By hand: float64, whole weights after every step of the plain loop."""
    model = zoo.make_odd(frozen=True, empty=False)
    kept = {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):  # a moment is lost between calls: so from the start each time
        model = zoo.make_odd(frozen=True, empty=False)
        zoo.plain_loop(model, step + 1)
        decay = min(DECAY, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            if p.requires_grad:
                kept[name] = decay * kept[name] + (1 - decay) * p.detach().double()
    return {name: value.float() for name, value in kept.items()}, model


def compare_with_plain(layout: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        engine = averaged(layout, world)
        steps(engine, world, range(STEPS))
        reader = everything(engine, world)
        expected, plain = plain_averages()
        ours = averages(reader)
        assert torch.equal(ours.pop("shift"), plain.shift)  # a buffer that nothing moves
        assert zoo.distance(ours, expected) < 2e-5
        assert not any(name.startswith("layers.0.") for name in ours)  # frozen

        swapped = copy.deepcopy(plain)
        with torch.no_grad():
            for name, p in swapped.named_parameters():
                p.copy_(expected.get(name, p))
        batches = zoo.my_microbatches(3, world.rank, world.size, 1)
        loss = evaluate(engine, _Measured(), batches, world)["loss"]
        tokens, labels = zoo.global_batch(3)
        means = [torch.nn.functional.cross_entropy(m(tokens), labels).item() for m in (swapped, plain)]
        assert loss == pytest.approx(means[0], rel=1e-5)
        assert loss != pytest.approx(means[1], rel=1e-3)
        assert_same_state(everything(engine, world), reader, "an evaluation leaves no trace")


class _Measured(zoo.OddTask):
    def metrics(self):
        return _Nothing()


class _Nothing:
    def to(self, device): ...
    def update(self, result, batch): ...
    def compute(self):
        return {}


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_same_as_plain_torch_and_evaluated_with(layout: str, world_size: int) -> None:
    run_distributed(compare_with_plain, world_size, layout)


def trains_as_without(layout: str) -> None:
    """The averages change nothing of the training, evaluations between its steps included; in bf16, too."""
    with join("cpu", needs_group=layout != "single") as world:
        with_them = averaged(layout, world, compute=torch.bfloat16)
        without = build(layout, world, frozen=True, empty=False, compute=torch.bfloat16)
        for step in range(4):
            steps(with_them, world, range(step, step + 1))
            evaluate(with_them, _Measured(), zoo.my_microbatches(step, world.rank, world.size, 1), world)
            train(without, world, 2, range(step, step + 1))
        ours, theirs = everything(with_them, world), everything(without, world)
        for name in averages(ours):
            del ours.tensors["ema", name]
        assert_same_state(ours, theirs, layout)


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2)])
def test_a_training_does_not_notice_them(layout: str, world_size: int) -> None:
    run_distributed(trains_as_without, world_size, layout)


def nudge_one_copy() -> None:
    with join("cpu", needs_group=True) as world:
        engine = averaged("ddp", world)
        steps(engine, world, range(2))
        replicas = Replicas(world, engine.state, 1)
        replicas.compare(2)
        piece = next(piece for piece in engine.state().pieces if piece.key == ("ema", "mix"))
        piece.data[0, 0] += world.rank
        replicas.compare(3)


def test_a_copy_of_an_average_that_differs_between_ranks_is_found() -> None:
    with pytest.raises(DivergedError, match="ema mix"):
        run_distributed(nudge_one_copy, 2)


def keep(layout: str, folder: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        engine = averaged(layout, world)
        steps(engine, world, range(3))
        state = everything(engine, world)
        if world.is_main:
            torch.save((state.tensors, state.hyper), f"{folder}/{layout}-{world.size}")


def load_from_all(layout: str, folder: str) -> None:
    with join("cpu", needs_group=layout != "single") as world:
        engine = averaged(layout, world)
        plain = build(layout, world, frozen=True, empty=False)
        for path in sorted(Path(folder).iterdir()):
            reader = MemoryReader(*torch.load(path, weights_only=False))
            engine.load(reader)
            assert_same_state(everything(engine, world), reader, f"{path.name} -> {layout} × {world.size}")
            plain.load(reader)  # an engine without averages takes the rest
            assert not averages(everything(plain, world))
        for name in averages(reader):
            del reader.tensors["ema", name], reader.index["ema", name]
        engine.load(reader)  # averages that are not there begin at the weights
        begun = everything(engine, world)
        weights = {name: begun.tensors.get(("weight", name), begun.tensors.get(("buffer", name))) for _, name in begun.index}
        assert averages(begun)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in averages(begun).items())


def test_bitwise_from_any_to_any(tmp_path: Path) -> None:
    for (layout, world_size), work in itertools.product(LAYOUTS, (keep,)):
        run_distributed(work, world_size, layout, str(tmp_path))
    for layout, world_size in (("single", 1), ("fsdp", 3), ("zero1", 2), ("zero3", 2)):
        run_distributed(load_from_all, world_size, layout, str(tmp_path))


def test_a_step_that_was_left_out_moves_no_average() -> None:
    with join("cpu") as world:
        engine = averaged("single", world)
        steps(engine, world, range(2))
        before = averages(everything(engine, world))
        engine.update(3, True)
        engine.update(3, torch.tensor(True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in averages(everything(engine, world)).items())
        engine.update(3, torch.tensor(False))
        on_device = averages(everything(engine, world))
        again = averaged("single", world)
        steps(again, world, range(2))
        again.update(3, False)
        assert zoo.distance(on_device, averages(everything(again, world))) < 1e-7
        assert zoo.distance(on_device, before) > 1e-5


def test_an_average_of_another_shape_is_refused_and_nothing_is_loaded() -> None:
    with join("cpu") as world:
        engine = averaged("single", world)
        steps(engine, world, range(1))
        before = everything(engine, world)
        wrong = MemoryReader(before.tensors | {("ema", "mix"): torch.zeros(2, 2), ("ema", "gone"): torch.zeros(1)}, before.hyper)
        with pytest.raises(StateError) as caught:
            engine.load(wrong)
        assert "different: ema mix is (2, 2)" in str(caught.value)
        assert "extra: ema gone" in str(caught.value)
        assert_same_state(everything(engine, world), before)


def train_part(folder: str, name: str, layout: str, steps: int) -> None:
    made = values(folder, layout, steps)
    made["run"]["name"] = name
    made["optim"]["ema"] = {"decay": 0.9}
    made["data"]["eval"], made["eval"] = {"split": 0.2}, {"every_steps": 4}
    bigtrain.train(made)


def kept(folder: Path, kind: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with open_checkpoint(find(folder / "checkpoints")[0]) as reader:
        for (own, name), spec in reader.index.items():
            if own == kind:
                found[name] = torch.empty(spec.shape, dtype=spec.dtype)
                reader.read_into(own, name, whole(spec.shape), found[name])
    return found


@pytest.mark.slow
def test_a_run_handed_from_engine_to_engine_has_the_averages_of_one_process(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_distributed(train_part, 1, folder, "one", "single", 12)
    for steps, layout in ((6, "fsdp"), (12, "zero3")):
        run_distributed(train_part, 2, folder, "moved", layout, steps)
    for kind in ("weight", "ema"):
        one, moved = (kept(tmp_path / "runs" / name, kind) for name in ("one", "moved"))
        assert zoo.distance(moved, one) < 1e-5, kind
