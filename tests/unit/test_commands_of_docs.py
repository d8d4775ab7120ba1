"""Every command that the README and the documentation show is run, on runs that are small.

A line runs as it stands, with what makes it small after it, or one word of it changed; the runs that the pages speak of
are trained before. What takes a cluster is rendered here, and run in tests/launchers/test_slurm.py.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bigtrain
from bigtrain.cli import main
from tests.helpers.resuming import one_thread
from tests.unit.test_docs import blocks

ROOT = Path(__file__).parents[2]
# Pages whose commands another test runs, in an order of their own.
ELSEWHERE = {"docs/evaluating.md": "test_evaluating_doc.py", "docs/tutorial.md": "test_walk.py"}
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page not in ELSEWHERE]

GPT: dict[str, Any] = {"vocab": 257, "layers": 2, "width": 16, "heads": 2, "context": 16}
SMALL_GPT = [
    *(f"model.args.{name}={value}" for name, value in GPT.items()),
    *("model.args.kv_heads=1", "model.args.mlp_width=24", "data.args={source: text.txt, context: 16}"),
    *("data.batch_size=4", "eval.max_batches=1", "train.steps=2", "optim.schedule.warmup_steps=0", "run.threads=1"),
]
# What is changed in a command: it is too long for a test otherwise, or names what is not there.
CHANGES = {"--step 120": "--step 3", "train.steps=50": "train.steps=2"}
ADDED: dict[str, list[str]] = {
    "train": ["run.name=here"],
    "launch": ["run.name=several"],
    "parity": ["--steps=2", "--engines=single", "--world-sizes=1", "--precisions=fp32", "--no-compile"],
}
# Where the exit code tells something other than success: what the machine lacks; that two steps prove nothing; that
# two runs differ; that a run has come to its end.
CODES = {"doctor": (0, 1, 2), "parity": (3,), "ckpt diff": (0, 1), "runs resume": (2,)}
ON_A_CLUSTER = ("--target slurm",)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for line in "\n".join(blocks(page, "")).splitlines():
            text = line.partition("#")[0].strip()
            if text.startswith("bigtrain ") and re.match(r"bigtrain [a-z]+\b(?! over| clips)", text):
                yield page, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands who has trained the runs that the pages speak of."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    Image.new("L", (8, 8), 200).save(folder / "photo.png")
    images = {
        "task": "classification",
        "model": "bigmodel",
        "data": {"name": "digits", "args": {"size": 28}, "batch_size": 512},
        "train": {"steps": 3},
        "checkpoint": {"every_steps": 2, "keep_best": "loss"},
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none", "wandb": "disabled"},
    }
    text = {
        **images,
        "task": "causal_lm",
        "model": {"name": "gpt", "args": {**GPT, "kv_heads": 1, "mlp_width": 24}},
        "data": {"name": "text", "args": {"source": str(folder / "text.txt"), "context": 16}, "batch_size": 4},
    }
    lora = {"finetune": {"init_from": str(folder / "runs/gpt"), "adapter": {"targets": ["*.q_proj"], "rank": 2}}}
    runs = {"quickstart": images, "another": images, "a": images, "b": images, "gpt": text, "lora": {**text, **lora}}
    with one_thread():
        for number, (name, config) in enumerate(runs.items()):
            bigtrain.train({**config, "run": {"name": name, "dir": str(folder / "runs"), "seed": number}})
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[list[str]], int]:
    """Runs a command in this process, with the runs' folder as the current one."""

    def run(words: list[str]) -> int:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left, one_thread():
            main()
        return int(left.value.code or 0)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), dict.fromkeys(commands()), ids=lambda value: value)
def test_it_runs(
    page: str, command: str, call: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    for old, new in CHANGES.items():
        command = command.replace(old, new)
    words = shlex.split(command)
    verb = " ".join(words[1:3]) if words[1] in ("ckpt", "runs") else words[1]
    if any(where in command for where in ON_A_CLUSTER):
        words += ["--dry-run"] * ("--dry-run" not in words)
        words += ["launch.nproc=1"] * (words[1] == "launch")
    else:
        is_run = words[1] in ("train", "launch", "try", "explain", "parity")
        words += SMALL_GPT * (is_run and "configs/gpt.yaml" in words) + ADDED.get(words[1], [])
    code = call(words)
    captured = capsys.readouterr()
    assert code in CODES.get(verb, (0,)), captured.out + captured.err
    assert "Traceback" not in captured.err


def test_there_are_many() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (Path(__file__).parent / test).read_text()
    found = [command for _, command in commands()]
    assert len(found) >= 30
    assert {command.split()[1] for command in found} >= {
        *ADDED,
        "try",
        "explain",
        "runs",
        "ckpt",
        "config",
        "sweep",
        "eval",
        "predict",
    }
