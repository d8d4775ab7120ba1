"""Real engines, ranks and files: what one engine saved, any other loads from disk, bit for bit, and trains on."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import Background, Ranks, diff, find, load_newest, open_checkpoint, prune, save, verify
from bigtrain.checkpoint.files import Files
from bigtrain.dist import World, join
from bigtrain.errors import DiskFullError, NoGoodError, RankError, SaveError
from bigtrain.state import MemoryReader
from tests.helpers import zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import IN_FULL, assert_same_state, build, everything, train

PLACES = [("fsdp", 2), ("zero3", 3), ("ddp", 2), ("zero1", 3), ("hsdp", 4), ("zero2", 2), ("single", 1)]
TARGETS = PLACES if IN_FULL else [("single", 1), ("fsdp", 3), ("zero3", 2)]


def train_and_save(layout: str, folder: str) -> None:
    """Save step 3, and beside it what every rank together had."""
    with join("cpu", needs_group=layout != "single") as world:
        engine = build(layout, world, frozen=True, empty=False)
        train(engine, world, 2, range(3))
        save(Ranks(world), Path(folder), 3, engine.state(), extra={"samples": 30}, own={"rank": world.rank})
        state = everything(engine, world)
        if world.is_main:
            torch.save((state.tensors, state.hyper), whole_state_of(folder))
        engine.close()


def whole_state_of(folder: str | Path) -> Path:
    return Path(folder, "whole.pt")


def read_whole_state(folder: str | Path) -> MemoryReader:
    return MemoryReader(*torch.load(whole_state_of(folder), weights_only=False))


def load_and_go_on(layout: str, folders: dict[str, str]) -> list[Any]:
    with join("cpu", needs_group=layout != "single") as world:
        engine = build(layout, world, frozen=True, empty=False)
        train(engine, world, 1, range(10, 12))  # what was there before must not matter
        seen = []
        for source, folder in folders.items():
            reader = load_newest(Ranks(world), Path(folder), engine.load)
            assert reader is not None
            assert (reader.step, reader.extra, reader.own(0)) == (3, {"samples": 30}, {"rank": 0})
            assert_same_state(
                everything(engine, world), read_whole_state(folder), f"{source} -> {layout} × {world.size}"
            )
            saved_again = save(Ranks(world), Path(folder, f"{layout}-{world.size}"), 3, engine.state(), extra={})
            if world.is_main:
                assert diff(reader.path, saved_again).differences == ()
            seen.append(train(engine, world, 2, range(3, 6)))
        engine.close()
        return seen


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for layout, size in PLACES:
        folders[layout] = str(tmp_path_factory.mktemp(layout))
        run_distributed(train_and_save, size, layout, folders[layout])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), TARGETS)
def test_any_engine_loads_what_any_other_saved(sources: dict[str, str], layout: str, size: int) -> None:
    tail, _ = zoo.plain_loop(zoo.make_odd(True, empty=False), 6)
    for seen in run_distributed(load_and_go_on, size, layout, sources)[0]:
        for ours, theirs in zip(seen, tail[3:], strict=True):
            assert max(map(zoo.relative, ours, theirs)) < 3e-6


@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("zero3", 3)])
def test_what_ranks_saved_one_process_loads(tmp_path: Path, layout: str, size: int) -> None:
    run_distributed(train_and_save, size, layout, str(tmp_path))
    path = find(tmp_path)[0]
    assert verify(path).is_good
    with open_checkpoint(path) as reader:
        assert all(found.cut for found in reader.manifest.tensors.values())  # nothing had to be listed
        assert [reader.own(rank) for rank in range(size)] == [{"rank": rank} for rank in range(size)]
        engine = build("single", World(), frozen=True, empty=False)
        engine.load(reader)
        assert_same_state(everything(engine, World()), read_whole_state(tmp_path))


def save_and_fail(folder: str) -> None:
    """Rank 1 has no space at the second save; nobody goes on alone, and the third save is good."""
    with join("cpu") as world:
        engine = build("fsdp", world)
        train(engine, world, 1, range(2))
        ranks = Ranks(world)
        save(ranks, Path(folder), 1, engine.state(), extra={})

        def full(operation: str, path: Path) -> None:
            if operation == "write" and path.name == "shard-00001.safetensors":
                raise OSError(28, "No space left on device")

        with pytest.raises(DiskFullError, match=r"no space for .*shard-00001.* bytes, and [\d,]+ were free"):
            save(ranks, Path(folder), 2, engine.state(), extra={}, files=Files(full))
        world.all_gather_object(None)
        assert [path.name for path in Path(folder).iterdir()] == ["step-00000001"]
        train(engine, world, 1, range(2, 3))
        save(ranks, Path(folder), 3, engine.state(), extra={})


def test_a_full_disk_on_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    run_distributed(save_and_fail, 2, str(tmp_path))
    assert [verify(path).is_good for path in find(tmp_path)] == [True, True]


def killed_while_saving(layout: str, folder: str, victim: int, operation: str) -> None:
    with join("cpu") as world:
        engine = build(layout, world, empty=False)

        def die(happening: str, path: Path) -> None:
            if happening == operation and "step-00000002" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)

        save(Ranks(world), Path(folder), 1, engine.state(), extra={})
        files = Files(die) if world.rank == victim else Files()
        save(Ranks(world), Path(folder), 2, engine.state(), extra={}, files=files)


@pytest.mark.parametrize(
    ("victim", "operation", "newest"), [(1, "sync", 1), (0, "rename", 1), (1, "close", 1), (0, "sync folder", 1)]
)
def test_a_rank_that_is_killed_commits_nothing(tmp_path: Path, victim: int, operation: str, newest: int) -> None:
    # Whichever is heard of first: the death itself, or what the other rank makes of it.
    with pytest.raises(RankError, match=r"exit code -9|Connection (reset|closed) by peer"):
        run_distributed(killed_while_saving, 2, "fsdp", str(tmp_path), victim, operation)
    assert find(tmp_path)[0].name == f"step-0000000{newest}"
    assert verify(find(tmp_path)[0]).is_good
    prune(tmp_path, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def fall_back(layout: str, folder: str) -> Any:
    """The newest is damaged in a place that one rank alone reads: all take the one before, and none hangs."""
    with join("cpu") as world:
        engine = build(layout, world, empty=False)
        states = []
        for step in (1, 2):
            train(engine, world, 1, range(step - 1, step))
            save(Ranks(world), Path(folder), step, engine.state(), extra={})
            states.append(everything(engine, world))
        if world.is_main:
            flip_last(Path(folder, "step-00000002"))
        world.all_gather_object(None)
        logging.getLogger("bigtrain.checkpoint").setLevel(logging.ERROR)
        reader = load_newest(Ranks(world), Path(folder), engine.load)
        assert reader is not None
        assert reader.step == 1
        assert_same_state(everything(engine, world), states[0])
        train(engine, world, 1, range(1, 2))
        assert_same_state(everything(engine, world), states[1])
        if world.is_main:
            flip_last(Path(folder, "step-00000001"))
        world.all_gather_object(None)
        with pytest.raises(NoGoodError, match="step-00000001/shard-00001"):
            load_newest(Ranks(world), Path(folder), engine.load)


def flip_last(path: Path) -> None:
    shard = path / "shard-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)


@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("zero3", 2), ("zero1", 2)])
def test_all_ranks_fall_back_though_one_alone_sees_the_damage(tmp_path: Path, layout: str, size: int) -> None:
    run_distributed(fall_back, size, layout, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002.bad"]


def save_in_the_background(layout: str, folder: str) -> list[int]:
    """Train on while checkpoints are written; those that fail are heard of on all ranks in one step."""
    with join("cpu") as world:

        def slow(operation: str, path: Path) -> None:
            if operation == "sync":
                time.sleep(0.2 * world.rank)  # ranks are done at different times
            if operation == "sync" and "step-00000004" in str(path) and world.rank == 1:
                raise OSError(5, "Input/output error")

        engine = build(layout, world, empty=False)
        background = Background(world, Path(folder), files=Files(slow))
        heard, states = [], {}
        for step in range(1, 13):
            background.wait_for_copy()
            train(engine, world, 1, range(step - 1, step))
            try:
                path, failure = background.poll(), None
            except SaveError as error:
                path, failure = None, error
            if path:
                assert path.exists()
                heard.append(step)
            elif failure:
                assert "Input/output error" in str(failure)
                heard.append(-step)
            if step % 4 == 0:
                states[step] = everything(engine, world)
                background.start(step, engine.state(), extra={"step": step})
            time.sleep(0.15)
        assert background.wait() == Path(folder, "step-00000012")
        for step in (8, 12):
            with open_checkpoint(Path(folder, f"step-{step:08d}")) as reader:
                engine.load(reader)
                assert_same_state(everything(engine, world), states[step])
        engine.close()
        return heard


@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_checkpoints_are_written_while_training_goes_on(tmp_path: Path, layout: str) -> None:
    heard = run_distributed(save_in_the_background, 2, layout, str(tmp_path))
    assert heard[0] == heard[1]
    assert [step < 0 for step in heard[0]] == [True, False]
    assert [path.name for path in find(tmp_path)] == ["step-00000012", "step-00000008"]
