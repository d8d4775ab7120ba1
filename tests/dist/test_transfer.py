"""What was learnt of the digits 0 to 4, taken to 5 to 9: frozen, unfrozen from the top, killed, under two engines."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import bigtrain
from bigtrain.checkpoint import find, open_checkpoint
from bigtrain.errors import RankError
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import losses
from tests.helpers.transfer import FINETUNE, config

FIRST, SECOND = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
STEPS_PER_EPOCH = 6  # of 717 samples, 128 a step


def pretrain(folder: str) -> None:
    bigtrain.train(config(Path(folder), "first", FIRST))


def finetune(folder: str, name: str, layout: str, kill_at: int | None) -> None:
    settings = config(Path(folder), name, SECOND, engine=engine_of(layout))
    settings["finetune"] = {**FINETUNE, "init_from": f"{folder}/runs/first", "new": "head.*"}

    def kill(info: Any) -> None:
        if info.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    bigtrain.train(settings, hooks=[kill])


def events(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if str(row.get("event")).startswith("phase")]


def frozen_digests(path: Path, phase: int) -> set[str]:
    return {row["frozen_digest"] for row in events(path) if row["phase"] == phase}


@pytest.mark.slow
def test_killed_in_each_phase_and_moved_it_follows_one_process(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_distributed(pretrain, 1, folder)
    run_distributed(finetune, 1, folder, "unbroken", "single", None)
    unbroken, moved = (tmp_path / "runs" / name for name in ("unbroken", "moved"))
    for layout, size, kill_at in (("fsdp", 2, 6), ("fsdp", 2, 18), ("zero3", 1, None)):
        if kill_at is None:
            run_distributed(finetune, size, folder, "moved", layout, kill_at)
            continue
        with pytest.raises(RankError, match="died with exit code -9"):
            run_distributed(finetune, size, folder, "moved", layout, kill_at)
    ours, theirs = losses(moved), losses(unbroken)
    assert [step for step, *_ in ours] == list(range(1, len(theirs) + 1))
    for (step, loss, norm), (_, their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5), step
        assert norm == pytest.approx(their_norm, rel=1e-4), step
    result, expected = (json.loads((path / "result.json").read_text())["metrics"] for path in (moved, unbroken))
    assert result["accuracy"] == expected["accuracy"]
    assert ours[-1][1] < ours[0][1]
    assert len(frozen_digests(moved, 0)) == len(frozen_digests(moved, 1)) == 1
    assert frozen_digests(moved, 0) == frozen_digests(unbroken, 0)
    assert frozen_digests(moved, 1) == frozen_digests(unbroken, 1)  # all that is frozen in it was so from the start
    with open_checkpoint(find(moved / "checkpoints")[0]) as reader:
        moments = {name for kind, name in reader.index if kind == "exp_avg"}
    assert moments == {"head.weight", "head.bias", "layers.2.conv.weight", "layers.2.conv.bias"}
