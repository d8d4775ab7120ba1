"""Profiles, histograms and graphs of real runs, read by what reads them: JSON, TensorBoard, plain torch."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import bigtrain
from bigtrain.dist import World
from bigtrain.state import WEIGHT
from bigtrain.tracking.graph import GraphRecorder
from bigtrain.tracking.histograms import edges, histograms
from bigtrain.tracking.reading import load_run
from tests.helpers.distributed import run_distributed
from tests.unit.tracking.test_making import config


def traced(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return list(json.load(file)["traceEvents"])


def test_a_profile_of_some_steps(tmp_path: Path) -> None:
    run = bigtrain.train({**config(tmp_path), "profile": {"steps": [3, 6]}}, ["data.eval=none"])
    folder = run.path / "profile"
    said = (run.path / "attempts" / "0" / "logs" / "rank-00000.stdout").read_text()
    assert f"step 6: profile: steps 3 to 5, in {folder}\n" in said
    events = traced(folder / "rank-00000.pt.trace.json.gz")
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert (names.count("step"), names.count("loss"), names.count("backward"), names.count("update")) == (3, 3, 3, 3)
    assert any(event["name"] == "aten::convolution" for event in events)
    assert "aten::" in (folder / "rank-00000.txt").read_text()
    (event,) = [event for event in load_run(run.path).events if event["event"] == "profile"]
    assert (event["step"], event["communication"]) == (6, 0.0)
    assert "steps 3 to 5" in event["text"]


@pytest.mark.parametrize("steps", [[0, 2], [9, 50], [50, 60]])
def test_a_profile_at_the_ends_of_a_run(tmp_path: Path, steps: list[int]) -> None:
    run = bigtrain.train({**config(tmp_path), "profile": {"steps": steps}})
    assert (run.path / "profile").exists() == (steps[0] < 10)
    assert run.outcome.steps == 10


def test_without_a_profile_nothing_is_wrapped(tmp_path: Path) -> None:
    task = bigtrain_task()
    bigtrain.train(config(tmp_path), task=task)
    assert "loss" not in vars(task)


def bigtrain_task() -> Any:
    from bigtrain.tasks.classification import Classification

    return Classification()


class OnePiece:
    def __init__(self, data: torch.Tensor, *, is_owner: bool = True, name: str = "w") -> None:
        self.kind, self.name, self.data, self.is_owner = WEIGHT, name, data, is_owner


def test_a_histogram_counts_every_weight_once() -> None:
    values = torch.cat((torch.randn(1000), torch.zeros(7), torch.tensor([1e-30, -1e30, 1e30])))
    pieces: Any = [OnePiece(values[:600]), OnePiece(values[600:]), OnePiece(values, is_owner=False)]
    held = histograms(pieces, World())["w"]
    assert sum(held["counts"]) == len(values)
    assert (held["min"], held["max"]) == (values.double().min(), values.double().max())
    assert held["sum"] == pytest.approx(values.double().sum().item())
    assert len(held["edges"]) == len(held["counts"]) + 1
    inner = values[(values.abs() < 1e3) & (values.abs() > 1e-9)].double()
    bounds = edges()
    for low, high, count in zip(held["edges"][1:-2], held["edges"][2:-1], held["counts"][1:-1], strict=True):
        expected = ((values.double() >= low) & (values.double() < high)).sum()
        assert count == expected
    assert len(inner) > 900
    assert bool((bounds[1:] > bounds[:-1]).all())


def count_pieces_of(rank_pieces: list[list[float]]) -> Any:
    import torch.distributed as dist

    world = World(dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)
    pieces: Any = [OnePiece(torch.tensor(part)) for part in [rank_pieces[world.rank]] if part]
    return histograms(pieces, world)


@pytest.mark.slow
def test_histograms_of_pieces_on_several_ranks_are_those_of_the_whole() -> None:
    parts = [[0.1, 0.2, -3.0], [5.0, 0.25], []]
    whole: Any = [OnePiece(torch.tensor([value for part in parts for value in part]))]
    expected = histograms(whole, World())
    for found in run_distributed(count_pieces_of, 3, parts):
        assert found.keys() == expected.keys()
        for name, value in expected["w"].items():
            assert found["w"][name] == pytest.approx(value), name


def test_tensorboard_shows_histograms_and_the_graph(tmp_path: Path) -> None:
    run = bigtrain.train(config(tmp_path, tensorboard={"histograms_every": 5, "graph": True}))
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    names = [name for name, _ in run.model.named_parameters()]
    assert sorted(board.Tags()["histograms"]) == sorted(f"weights/{name}" for name in names)
    last = board.Histograms(f"weights/{names[0]}")[-1]
    weight = dict(run.model.named_parameters())[names[0]]
    assert last.step == 10
    assert last.histogram_value.num == weight.numel()
    assert last.histogram_value.max == pytest.approx(weight.max().item())
    nodes = {node.name: node for node in board.Graph().node}
    assert {name.rpartition(".")[0].replace(".", "/") for name in names} <= nodes.keys()
    assert nodes["input"].op == "Input"


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.head.weight.new_zeros(len(x), 4) + self.one(x) + self.two(x))


def test_a_graph_tells_what_feeds_what() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), Branches())
    recorder = GraphRecorder(model)
    model(torch.ones(1, 2))
    assert recorder.nodes == [
        ("input", "Input", []),
        ("0", "Linear", ["input"]),
        ("1", "ReLU", ["0"]),
        ("2/one", "Linear", ["1"]),
        ("2/two", "Linear", ["1"]),
        ("2/head", "Linear", ["2/two"]),
    ]
    model(torch.ones(1, 2))
    assert len(recorder.nodes) == 6
    assert not model[0]._forward_hooks
