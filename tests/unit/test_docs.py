"""What the documentation shows is run as it stands."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.config.loader import load

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(path: str, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall((ROOT / path).read_text()) if kind == language]


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    for text in blocks("docs/extending.md", "python") + blocks("docs/extending.md", "yaml"):
        (folder / text.split("\n")[0].removeprefix("# ")).write_text(text)
    return folder


@pytest.mark.slow
def test_own_model_data_and_task(examples: Path) -> None:
    out = run(examples, "-m", "bigtrain", "train", "run.yaml")
    assert "run folder: runs/run" in out
    result = json.loads((examples / "runs/run/result.json").read_text())
    assert result["metrics"]["r2"] > 0.3


@pytest.mark.slow
def test_objects_and_hooks(examples: Path) -> None:
    out = run(examples, "train.py")
    assert "step 20: loss" in out
    assert "step 21: loss" not in out
    assert (examples / "runs/from-python/result.json").exists()


@pytest.mark.slow
def test_a_trained_model(examples: Path) -> None:
    if not (examples / "runs/run").exists():
        run(examples, "-m", "bigtrain", "train", "run.yaml")
    assert re.match(r"foretold \d\.\d\d, measured 1\.51, after 240 steps", run(examples, "ask.py"))


@pytest.mark.slow
def test_own_model_data_and_task_in_two_processes(examples: Path) -> None:
    run(examples, "-m", "bigtrain", "launch", "run.yaml", "--nproc=2", "engine.name=fsdp", "run.name=two")
    result = json.loads((examples / "runs/two/result.json").read_text())
    assert (result["engine"], result["world_size"]) == ("fsdp", 2)


@pytest.mark.slow
def test_own_optimizer_from_one_engine_to_another(examples: Path) -> None:
    changes = ("optim.name=my_optimizer:Sign", "optim.args={momentum: 0.8}", "run.name=sign")
    start = ("-m", "bigtrain", "launch", "run.yaml", "--nproc=2", *changes)
    run(examples, *start, "engine.name=fsdp", "train.epochs=1")
    out = run(examples, *start, "engine.name=deepspeed", "engine.deepspeed.stage=2", "train.epochs=2")
    assert "going on from step 12, saved by fsdp on 2 processes" in out


@pytest.mark.slow
def test_own_metrics_are_the_same_in_one_process_and_in_two(examples: Path) -> None:
    measured = []
    for name, *command in (("alone", "train"), ("both", "launch", "--nproc=2")):
        changes = ("task.name=my_metrics:HuberWithinTen", f"run.name={name}", "train.epochs=1")
        out = run(examples, "-m", "bigtrain", command[0], "run.yaml", *command[1:], *changes)
        assert "warning" not in out
        measured.append(json.loads((examples / f"runs/{name}/result.json").read_text())["metrics"]["within_ten"])
    assert 0 < measured[0] == measured[1] < 1


@pytest.mark.slow
def test_python_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (code,) = blocks("README.md", "python")
    (tmp_path / "it.py").write_text(code)
    assert "runs/quickstart" in run(tmp_path, "it.py")


def test_run_file_of_the_readme(tmp_path: Path) -> None:
    (text,) = blocks("README.md", "yaml")
    (tmp_path / "it.yaml").write_text(text)
    assert load(tmp_path / "it.yaml").config.engine.name == "fsdp"


@pytest.mark.slow
def test_commands_of_the_readme_exist() -> None:
    for line in "\n".join(blocks("README.md", "")).splitlines():
        words = line.split("#")[0].split()
        if not words or words[0].isdigit():
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[1] in ("train", "launch", "parity"):
            load(ROOT / words[2], [word for word in words[3:] if "=" in word])
        elif words[1] in ("ckpt", "report", "runs", "replay", "eval", "predict"):  # of a run that need not be there
            run(ROOT, "-m", *words[:3], "--help")
        elif words[1] == "doctor":  # which says by its exit code what it found
            run(ROOT, "-m", *words, "--help")
        else:
            run(ROOT, "-m", *words)


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(bigtrain/[\w/]+\.py)`", text) + re.findall(r"\]\((\w[\w/.]+)\)", text)
    assert len(named) >= 10
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_is_right(path: Path) -> None:
    assert load(path).config.run.name == path.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("quickstart", ["engine.name=single", "train.epochs=1"]),
        ("gpt", ["train.steps=3", "optim.schedule.warmup_steps=1", "eval.every_steps=3", "eval.max_batches=1"]),
        ("resnet_digits", ["train.steps=3", "optim.schedule.warmup_steps=1", "eval.max_batches=1"]),
    ],
)
def test_run_files_run(tmp_path: Path, name: str, changes: list[str]) -> None:
    run(ROOT, "-m", "bigtrain", "train", f"configs/{name}.yaml", f"run.dir={tmp_path}", *changes)
    assert (tmp_path / name / "result.json").exists()


@pytest.mark.slow
def test_a_run_file_whose_data_are_missing_says_which_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigtrain", "train", str(ROOT / "configs/cifar10.yaml"), "data.args.root=nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "cifar-10" in done.stderr.lower()
    assert list(tmp_path.iterdir()) == []


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    """pytest does not look into folders of certain names, `dist` among them, unless told otherwise."""
    left_out = request.config.getini("norecursedirs")
    folders = [path.name for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert "dist" in folders
    assert not [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]
