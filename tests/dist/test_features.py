"""Features that one engine's ranks have computed serve every other engine and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bigtrain
from tests.dist.test_resuming import engine_of
from tests.helpers import transfer
from tests.helpers.distributed import run_distributed
from tests.helpers.resuming import losses


def train(folder: str, name: str, layout: str, cached: bool = True) -> list[str]:
    values = transfer.config(Path(folder), name, [0, 1, 2, 3, 4], engine=engine_of(layout))
    values["train"] = {"epochs": 2, "micro_batch_size": 32}
    values["finetune"] = {"freeze": ["stem.*", "layers.*"]}
    values["optim"]["ema"] = {"decay": 0.9}
    if cached:
        values["finetune"]["feature_cache"] = f"{folder}/features"
    run = bigtrain.train(values)
    lines: list[Any] = (run.path / "attempts/0/logs/rank-00000.stdout").read_text().splitlines()
    return [line for line in lines if "features" in line]


@pytest.mark.slow
def test_computed_and_read_by_any(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_distributed(train, 1, folder, "without", "single", False)
    for makes, size, readers in (("fsdp", 3, [("zero3", 2), ("ddp", 2)]), ("zero2", 2, [("single", 1), ("fsdp", 2)])):
        words = run_distributed(train, size, folder, makes, makes)[0]
        assert "features of 901 samples before head" in words[0]
        for reads, count in readers:
            words = run_distributed(train, count, folder, f"{reads}-after-{makes}", reads)[0]
            assert "are read from" in words[0], reads
        (cache,) = (tmp_path / "features").iterdir()
        assert len(list(cache.glob("train-0-*"))) == size
        cache.rename(tmp_path / f"by-{makes}")
    expected = losses(tmp_path / "runs/without")
    for run in (tmp_path / "runs").iterdir():
        for ours, theirs in zip(losses(run), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), run.name


def fail_on_one_rank(folder: str) -> None:
    import os

    if os.environ["RANK"] == "1":
        from bigtrain.features.store import ShardWriter

        def full(self: ShardWriter, parts: Any) -> None:
            raise OSError(28, "No space left on device")

        ShardWriter.add = full  # type: ignore[method-assign]
    train(folder, "run", "fsdp")


def test_a_disk_that_is_full_on_one_rank_stops_all(tmp_path: Path) -> None:
    from bigtrain.errors import SaveError

    with pytest.raises(SaveError, match="No space left"):
        run_distributed(fail_on_one_rank, 2, str(tmp_path))
    assert list((tmp_path / "features").iterdir()) == []
