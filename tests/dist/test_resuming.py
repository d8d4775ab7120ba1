"""One run handed from engine to engine and from one number of ranks to another: bit for bit at the border, and the
losses of a run that was never broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bigtrain
from bigtrain import saving
from bigtrain.checkpoint import Ranks, diff, find, save
from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.resuming import resume
from bigtrain.trainer import assemble
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import config, losses, stop

# (engine, ranks): the whole is trained in as many parts, of ten steps each.
HANDS = [("fsdp", 2), ("zero3", 3), ("ddp", 1), ("zero1", 2)]
STEPS_A_PART = 10


def engine_of(layout: str) -> dict[str, Any]:
    if layout.startswith("zero"):
        return {"name": "deepspeed", "device": "cpu", "deepspeed": {"stage": int(layout[-1])}}
    if layout == "hsdp":
        return {"name": "fsdp", "device": "cpu", "fsdp": {"shard_size": 2}}
    return {"name": layout, "device": "cpu"}


def values(folder: str, layout: str, steps: int) -> dict[str, Any]:
    """Without dropout, which draws anew for another number of ranks; constant, so that a part knows no end."""
    made = config(Path(folder), engine=engine_of(layout), train={"steps": steps, "micro_batch_size": 1})
    made["model"]["args"]["dropout"] = 0.0
    made["optim"] |= {"lr": 1e-3, "schedule": "constant"}
    return made


def train_part(folder: str, layout: str, steps: int) -> None:
    """Go on to this step; first see that what was loaded is what was saved, to the last bit."""
    made = values(folder, layout, steps)
    if steps > STEPS_A_PART:
        with join("cpu", needs_group=layout != "single") as world:
            training = assemble(from_dict(made).config, world)
            resumed = resume(training, Path(folder, "runs", "run", "checkpoints"))
            assert resumed is not None
            again = save(Ranks(world), Path(folder, "again"), steps, training.engine.state(), extra={})
            if world.is_main:
                assert diff(resumed.path, again).differences == ()
            training.close()
    bigtrain.train(made)


def train_by_the_clock(folder: str) -> list[int]:
    """Save every three minutes, in a run whose steps take one; the steps after which it was saved."""
    now = [0.0]
    saving.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[assignment]
    made = values(folder, "ddp", 13)
    made["checkpoint"] = {"every_steps": None, "every_minutes": 3, "at_end": False, "keep": None}

    def wait(info: bigtrain.StepInfo) -> None:
        now[0] += 60

    run = bigtrain.train(made, hooks=wait)
    return sorted(int(path.name[-8:]) for path in find(run.path / "checkpoints"))


def test_by_the_clock_of_the_first_rank_all_save_once(tmp_path: Path) -> None:
    saved = run_distributed(train_by_the_clock, 2, str(tmp_path))[0]
    assert saved == [4, 8, 12]  # ranks agree on it a step later


def train_whole(folder: str, micro_batch_size: int) -> None:
    made = values(folder, "single", STEPS_A_PART * len(HANDS))
    made["train"]["micro_batch_size"] = micro_batch_size
    bigtrain.train(made)


@pytest.mark.slow
def test_a_run_goes_from_hand_to_hand(tmp_path: Path) -> None:
    for number, (layout, size) in enumerate(HANDS, 1):
        run_distributed(train_part, size, str(tmp_path), layout, number * STEPS_A_PART)
    unbroken = []
    for micro_batch_size in (1, 2):
        folder = tmp_path / str(micro_batch_size)
        folder.mkdir()
        run_distributed(train_whole, 1, str(folder), micro_batch_size)
        unbroken.append(losses(folder / "runs" / "run"))
    ours = losses(tmp_path / "runs" / "run")
    assert [step for step, *_ in ours] == list(range(1, len(HANDS) * STEPS_A_PART + 1))
    floor = 0.0  # training is chaotic: by how much one process differs from itself when its batches are split otherwise
    for (step, loss, norm), (_, *theirs), (_, *split) in zip(ours, *unbroken, strict=True):
        floor = max(floor, abs(split[1] - theirs[1]) / theirs[1])
        assert loss == pytest.approx(theirs[0], rel=1e-5)
        assert norm == pytest.approx(theirs[1], rel=1e-5) or (floor > 1e-6 and step > STEPS_A_PART)


def train_and_stop(folder: str, layout: str, at: int | None) -> None:
    made = config(Path(folder), engine=engine_of(layout))
    bigtrain.train(made, hooks=[stop(at)] if at else [])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("zero2", 2), ("ddp", 3), ("hsdp", 4)])
def test_under_the_same_engine_and_ranks_it_is_the_same_to_the_last_bit(tmp_path: Path, layout: str, size: int) -> None:
    """With dropout, whose random numbers each rank goes on with."""
    whole = tmp_path / "whole"
    whole.mkdir()
    run_distributed(train_and_stop, size, str(whole), layout, None)
    for at in (4, 8, None):
        run_distributed(train_and_stop, size, str(tmp_path), layout, at)
    ours, theirs = (folder / "runs" / "run" for folder in (tmp_path, whole))
    assert losses(ours) == losses(theirs)
    mine, other = (find(path / "checkpoints")[0] for path in (ours, theirs))
    assert diff(mine, other).differences == ()
