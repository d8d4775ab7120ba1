"""A run that changes what it trains, under every engine, handed from one to another within phases and at their ends."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bigtrain
from bigtrain import models, phases
from bigtrain.checkpoint import find
from bigtrain.doors import open_whole
from bigtrain.errors import CombinationError, DivergedError, FreezeError
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed
from tests.helpers.phases import FINETUNE, STEPS, config
from tests.helpers.resuming import losses, stop

# (engine, ranks, where it stops): phases begin at steps 4 and 8.
CHAINS = [
    [("zero3", 2, STEPS)],
    [("fsdp", 2, 5), ("zero3", 1, 8), ("ddp", 2, STEPS)],
    [("zero1", 2, 6), ("fsdp", 3, STEPS)],
    [("zero2", 2, 9), ("hsdp", 4, STEPS)],
]


def train(folder: str, layout: str, at: int, changes: dict[str, Any]) -> None:
    made = config(Path(folder), engine=engine_of(layout), **changes)
    if "compile" in changes:
        warnings.simplefilter("ignore")  # those of torch itself, while it compiles
    bigtrain.train(made, hooks=[stop(at)] if at < STEPS else [])


@pytest.mark.slow
def test_what_is_frozen_can_stay_where_it_came_from(tmp_path: Path) -> None:
    """Under every engine, into the next phase, and with what has begun to train saved from then on."""
    args = config(tmp_path)["model"]["args"]
    torch.manual_seed(2)
    save_file(models.build("gpt", args).state_dict(), weights := tmp_path / "weights.safetensors")
    changes = {
        "finetune": {**FINETUNE, "init_from": str(weights)},
        "checkpoint": {"every_steps": 3, "keep": None, "weights": "trainable"},
    }
    whole = {**changes, "checkpoint": {"every_steps": None}}
    (tmp_path / "whole").mkdir()
    run_distributed(train, 1, str(tmp_path / "whole"), "single", STEPS, whole)
    for layout, size, at in [("fsdp", 2, 5), ("zero3", 2, 8), ("ddp", 1, STEPS)]:
        run_distributed(train, size, str(tmp_path), layout, at, changes)
    path = tmp_path / "runs" / "run"
    for ours, theirs in zip(losses(path), losses(tmp_path / "whole" / "runs" / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    held = {}
    for checkpoint in find(path / "checkpoints"):
        with open_whole(checkpoint) as reader:
            assert reader.base is not None
            saved = {name for kind, name in reader.manifest.tensors if kind == "weight"}
            assert saved.isdisjoint(reader.base.tensors)
            assert saved | reader.base.tensors.keys() == {name for kind, name in reader.index if kind == "weight"}
            held[reader.step] = len(saved)
    assert held == {3: 1, 4: 1, 6: 11, 8: 11, 9: 15, 12: 15}


def events(path: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == name]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run_distributed(train, 1, str(folder), "single", STEPS, {})
    return folder / "runs" / "run"


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(layout for layout, *_ in chain))
def test_handed_on_it_follows_one_process(tmp_path: Path, unbroken: Path, chain: list[tuple[str, int, int]]) -> None:
    for layout, size, at in chain:
        run_distributed(train, size, str(tmp_path), layout, at, {})
    path = tmp_path / "runs" / "run"
    ours, theirs = losses(path), losses(unbroken)
    assert [step for step, *_ in ours] == list(range(1, STEPS + 1))
    for (_, loss, norm), (_, their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-5)
    for name in ("phase", "phase proved"):
        # What is frozen at first is the same to the last bit. Later it has been trained, and rounding differs.
        digests = {row["frozen_digest"] for row in events(path, name) + events(unbroken, name) if row["phase"] == 0}
        assert len(digests) == 1
    for phase in (1, 2):
        assert len({row["frozen_digest"] for row in events(path, "phase proved") if row["phase"] == phase}) == 1
    assert {row["phase"] for row in events(path, "phase proved")} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp", {"compile": "blocks", "activation_checkpointing": "full"}),
        ("zero2", {"activation_checkpointing": "full"}),
    ],
)
def test_compiled_or_recomputed_it_follows_one_process(
    tmp_path: Path, unbroken: Path, layout: str, changes: dict[str, Any]
) -> None:
    run_distributed(train, 2, str(tmp_path), layout, STEPS, changes)
    for (_, loss, norm), (_, their_loss, their_norm) in zip(
        losses(tmp_path / "runs" / "run"), losses(unbroken), strict=True
    ):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1", "zero3"])
def test_bf16_changes_phases_too(tmp_path: Path, layout: str) -> None:
    run_distributed(train, 2, str(tmp_path), layout, STEPS, {"precision": "bf16"})
    assert {row["phase"] for row in events(tmp_path / "runs" / "run", "phase proved")} == {0, 1, 2}


def plant(folder: str, layout: str, fault: str) -> str:
    """Change a frozen tensor on one rank after step 5, and train on: what the run fails of."""
    built: list[Any] = []
    original = phases.assemble

    def remembered(*args: Any, **options: Any) -> Any:
        built.append(original(*args, **options))
        return built[-1]

    def hook(info: Any) -> None:
        training = built[-1]
        if info.step != 5 or training.world.rank != 1:
            return
        p = training.model.get_parameter(fault)
        part = getattr(p, "ds_tensor", getattr(p, "_local_tensor", p))
        with torch.no_grad():
            part.detach().view(-1)[:1].add_(1e-3)

    phases.assemble = remembered
    try:
        bigtrain.train(config(Path(folder), engine=engine_of(layout)), hooks=[hook])
    except (FreezeError, DivergedError) as error:  # copies are compared before every checkpoint as well
        return str(error)
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "zero3"])
def test_a_fault_on_one_rank_stops_all(tmp_path: Path, layout: str) -> None:
    name = "layers.0.mlp.up_proj.weight"
    of_ranks = run_distributed(plant, 2, str(tmp_path), layout, name)
    assert len(set(of_ranks)) == 1
    assert name in of_ranks[0]
    assert "step 7" in of_ranks[0] or "holds another weight" in of_ranks[0]
    assert [path.name for path in find(tmp_path / "runs" / "run" / "checkpoints")][-1] == "step-00000004"


def refuse(folder: str) -> str:
    made = config(Path(folder), task="classification", engine=engine_of("ddp"))
    made["model"] = {"name": "torchvision/resnet18", "args": {"num_classes": 10, "in_channels": 1}}
    made["data"] = {"name": "digits", "batch_size": 16}
    made["finetune"] = {"freeze": ["conv1.*", "bn1.*", "layer*"], "unfreeze": [{"at_epoch": 2, "match": "layer4.*"}]}
    try:
        bigtrain.train(made)
    except CombinationError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_batchnorm_that_will_train_over_ranks_is_refused_before_the_first_phase(tmp_path: Path) -> None:
    for said in run_distributed(refuse, 2, str(tmp_path)):
        assert "layer4.0.bn1" in said
        assert "freeze_batchnorm" in said
    assert not (tmp_path / "runs").exists()
