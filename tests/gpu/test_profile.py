"""A profile on CUDA: kernels in the trace, NVTX ranges, and a snapshot of the memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import bigtrain


def test_a_profile_has_kernels_and_a_memory_snapshot(tmp_path: Path) -> None:
    run = bigtrain.train(
        {
            "run": {"dir": str(tmp_path), "name": "it"},
            "task": "classification",
            "model": {"name": "simple_cnn"},
            "data": {"name": "synthetic", "args": {"kind": "classification", "samples": 64}, "batch_size": 8},
            "train": {"steps": 6},
            "profile": {"steps": [2, 5]},
            "track": {"progress": "none", "wandb": "disabled"},
        }
    )
    folder = run.path / "profile"
    with gzip.open(folder / "rank-00000.pt.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum(event["name"] == "update" and event.get("cat") == "user_annotation" for event in events) == 3
    assert (folder / "rank-00000.memory.pickle").stat().st_size > 1000
