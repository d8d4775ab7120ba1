"""Losses that leap: told, or undone by going back to a checkpoint from before and leaving the batches out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.checkpoint import find
from bigtrain.errors import SpikeError
from bigtrain.health.spikes import SpikeWatch
from bigtrain.protocols import Batch, LossSum
from bigtrain.replaying import replay
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tracking.reading import load_run
from bigtrain.trainer import Subject
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import BrokenOffError, break_off, losses, one_thread

BATCH, EVERY = 4, 10


class Leaping(CausalLM):
    """Its loss is ten times what it is on some batches, known by a sample in them."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.bad = bad
        self.seen: list[tuple[int, ...]] = []

    def loss(self, model: Any, batch: Batch) -> LossSum:
        result = super().loss(model, batch)
        indices = tuple(int(index) for index in batch.indices)
        self.seen.append(indices)
        return result._replace(total=result.total * 10) if set(indices) & set(self.bad) else result


def run_file(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder / "runs"), "seed": 3},
        "task": "causal_lm",
        "model": {
            "name": "gpt",
            "args": {"vocab": 31, "layers": 1, "width": 16, "heads": 2, "context": 8, "dropout": 0.1},
        },
        "data": {
            "name": "synthetic",
            "args": {"kind": "causal_lm", "samples": 400, "context": 8, "vocab": 31},
            "eval": "none",
            "batch_size": BATCH,
        },
        "train": {"steps": 50},
        "engine": {"device": "cpu"},
        "checkpoint": {"every_steps": EVERY, "background": False},
        "track": {"log_every": 4, "progress": "none", "wandb": "disabled"},
        **changes,
    }


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, ...]]:
    """The samples of each step of the run without a spike."""
    task = Leaping(())
    with one_thread():
        bigtrain.train(run_file(tmp_path_factory.mktemp("whole")), task=task)
    return task.seen[-50:]  # the first one is a trial before any step


ROLL_BACK = {"on_spike": "roll_back"}


def test_a_spike_is_told_and_the_run_goes_on(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    with one_thread():
        run = bigtrain.train(run_file(tmp_path), task=Leaping(order[32][:1]))
    record = load_run(run.path)
    (event,) = [row for row in record.events if row["event"] == "spike"]
    assert event["step"] == 33
    assert "times that of the steps before" in event["text"]
    assert run.outcome.steps == 50
    assert run.outcome.position == (0, 200)
    assert "spike" in (run.path / "report.html").read_text()


def test_a_spike_is_undone_and_its_batches_left_out(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    """What is trained is what would have been without the batches between the checkpoint and the spike."""
    task = Leaping(order[32][:1])
    with one_thread():
        run = bigtrain.train(run_file(tmp_path, health=ROLL_BACK), task=task)
    events = [(row["event"], row["step"]) for row in load_run(run.path).events]
    assert events[-6:] == [
        ("checkpoint", 20),
        ("checkpoint", 30),
        ("spike", 33),
        ("rollback", 30),
        ("checkpoint", 40),
        ("checkpoint", 50),
    ]
    assert task.seen[-20:-3] == order[33:50]  # step 31 has the batch after the spike's
    assert run.outcome.position == (0, 212)
    assert [step for step, _, _ in losses(run)] == [*range(4, 50, 4), 50]

    with one_thread():
        replayed = replay(load_run(run.path), 36, print, subject=Subject(task=Leaping(order[32][:1])))
    held = {step: (loss, norm) for step, loss, norm in losses(run)}
    assert [row["step"] for row in replayed] == [*range(31, 37)]
    assert (replayed[-1]["loss"], replayed[-1]["grad_norm"]) == held[36]


@pytest.mark.slow
def test_a_run_that_is_killed_comes_to_the_same(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    ends = []
    for name, breaks in (("whole", ()), ("before", (29,)), ("between", (35,)), ("after", (42,))):
        config = run_file(tmp_path, health=ROLL_BACK, run={"name": name, "dir": str(tmp_path), "seed": 3})
        with one_thread():
            for at in breaks:
                with pytest.raises(BrokenOffError):
                    bigtrain.train(config, task=Leaping(order[32][:1]), hooks=[break_off(at)])
            run = bigtrain.train(config, task=Leaping(order[32][:1]))
        ends.append((losses(run), run.outcome.position, run.outcome.samples))
    assert ends[1:] == [ends[0]] * 3


def test_before_the_first_checkpoint_it_begins_anew(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    config = run_file(tmp_path, health=ROLL_BACK, checkpoint={"every_steps": None})
    with one_thread():
        run = bigtrain.train(config, task=Leaping(order[25][:1]))
    assert ("rollback", 0) in [(row["event"], row["step"]) for row in load_run(run.path).events]
    assert (run.outcome.steps, run.outcome.position) == (50, (0, 304))


def test_it_does_not_go_back_for_ever(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    """Every batch after the thirtieth leaps: no leaving out helps, and no checkpoint was saved of any of it."""
    good = {index for batch in order[:30] for index in batch}
    bad = tuple(index for index in range(400) if index not in good)
    with one_thread(), pytest.raises(SpikeError, match="3 times before from step 30") as caught:
        bigtrain.train(run_file(tmp_path, health=ROLL_BACK), task=Leaping(bad))
    assert caught.value.remedy
    assert find(tmp_path / "runs/run/checkpoints")[0].name == "step-00000030"


def on_two_ranks(folder: str, bad: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    config = run_file(Path(folder), health=ROLL_BACK, engine={"name": "fsdp", "device": "cpu"})
    run = bigtrain.train(config, task=Leaping(bad))
    return run.outcome.steps, run.outcome.position


@pytest.mark.slow
def test_all_ranks_go_back_together(tmp_path: Path, order: list[tuple[int, ...]]) -> None:
    assert run_distributed(on_two_ranks, 2, str(tmp_path), order[32][:1]) == [(50, (0, 212))] * 2
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert [row["event"] for row in map(json.loads, lines) if row.get("event") in ("spike", "rollback")] == [
        "spike",
        "rollback",
    ]


def seen(values: list[Any], **options: Any) -> list[int]:
    watch = SpikeWatch(5.0, **options)
    found = []
    for step, value in enumerate(values, 1):
        watch.observe(step, value, (0, step))
        if step % 7 == 0:
            found += [spike.step for spike in watch.look()]
    return found + [spike.step for spike in watch.look()]


def test_what_is_a_spike() -> None:
    calm = [1.0] * 30
    assert seen([*calm, 10.0, *calm]) == [31]
    assert seen([*calm, 4.9, *calm]) == []
    assert seen([1.0] * 19 + [10.0]) == []  # too little to compare with
    assert seen([*calm, 10.0, 10.0, 10.0]) == [31]  # a level that stays is told once
    assert seen([*calm, float("nan"), float("inf"), *calm]) == []  # another watch's business
    assert seen([0.01, 0.2] * 20 + [0.39]) == []  # losses that vary much have no spikes
    assert seen([0.0] * 30 + [1.0]) == []
    assert seen([torch.tensor(v, dtype=torch.float64) for v in [*calm, 10.0, 1.0]]) == [31]
    assert seen([*calm, 10.0, 100.0], rolls_back=True) == [31]
    off = SpikeWatch(None)
    off.observe(1, 1.0, (0, 1))
    assert list(off.look()) == []
