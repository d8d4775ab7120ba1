"""benchmarks/gpu.py runs from its beginning to its end, here on a CPU with toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = ["environment", "checks", "product", "gpt_1b", "gpt_8b", "vit", "peers"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    done = run("--tiny", "--device", "cpu", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tiny"] is True
    assert list(found["parts"]) == PARTS
    for name, part in found["parts"].items():
        assert part["rows"], name
        assert f"## {name}\n" in done.stdout
    for name in ("gpt_1b", "gpt_8b"):
        (row,) = found["parts"][name]["rows"]
        assert row["tokens/s"] == pytest.approx(row["sequences a step"] * row["context"] / row["ms a step"] * 1e3)
        assert row["MFU, causal, %"] is None
    timed = {row["with"]: row for row in found["parts"]["peers"]["rows"]}
    assert timed["by hand"]["ms a step"] > 0
    assert timed["bigtrain"]["ms a step"] > 0


def test_what_does_not_fit_or_has_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_sizes

    monkeypatch.setattr(gpu_sizes.Bench, "memory", 80 * 2**30)
    bench = gpu_sizes.Bench(torch.device("cpu"), gpu_sizes.Sizes())
    parameters = 128256 * 4096 * 2 + 32 * (4096 * (4096 * 2 + 1024 * 2 + 14336 * 3) + 2 * 4096) + 4096
    result = gpu.run_part(bench, "gpt_8b", end=float("inf"), scale=1.0)
    assert result["left out"].startswith(f"{parameters * 14 / 2**30:.0f} GiB of weights")
    assert result["left out"].endswith("and the device has 80 GiB")
    assert gpu.run_part(bench, "gpt_1b", end=0.0, scale=1.0) == {"left out": "0 s are left"}


@pytest.mark.slow
def test_a_gpu_is_needed() -> None:
    done = run()
    assert done.returncode == 2
    assert "--tiny --device cpu" in done.stderr
