"""What a run can be made again from: in a real git repository, and outside of any."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bigtrain.tracking.repro import command, write_repro


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("lr = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_can_be_had_again(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").write_text("lr = 2\n")
    (repository / "new.py").touch()
    run = tmp_path / "run"
    run.mkdir()
    assert write_repro(run, 0, ["A GPU", "A GPU"]) == []
    held = run / "repro"
    commit = (held / "commit").read_text().strip()
    assert commit == git(repository, "rev-parse", "HEAD")
    diff = (held / "diff.patch").read_text()
    assert "# not known to git: new.py" in diff
    git(repository, "checkout", "-q", commit, "--", "train.py")
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=repository, check=True)
    assert (repository / "train.py").read_text() == "lr = 2\n"
    machine = json.loads((held / "machine.json").read_text())
    assert machine["commit"] == f"{commit[:12]} with changes"
    assert machine["gpus"] == ["A GPU", "A GPU"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    packages = (held / "packages.txt").read_text().splitlines()
    assert [line for line in packages if line.startswith("torch==")]
    assert len(packages) > 50


def test_a_later_start_keeps_only_what_has_changed(repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_repro(run, 0)
    assert write_repro(run, 1) == []
    (repository / "train.py").write_text("lr = 3\n")
    assert write_repro(run, 2) == ["diff.patch", "machine.json"]
    assert sorted(path.name for path in (run / "repro" / "attempt-2").iterdir()) == ["diff.patch", "machine.json"]
    assert "+lr = 3" in (run / "repro" / "attempt-2" / "diff.patch").read_text()
    assert "+lr = 3" not in (run / "repro" / "diff.patch").read_text()


def test_outside_of_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_repro(tmp_path, 0)
    assert (tmp_path / "repro" / "commit").read_text() == "not in a git repository\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert write_repro(tmp_path, 1) == []


def test_no_password_of_the_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    monkeypatch.setenv("HF_TOKEN", "canary-9876543210")
    write_repro(tmp_path, 0)
    assert "canary" not in "".join(path.read_text() for path in (tmp_path / "repro").iterdir())


@pytest.mark.parametrize(
    ("program", "said"),
    [("/somewhere/bigtrain/__main__.py", "bigtrain"), ("/usr/bin/bigtrain", "bigtrain"), ("mine.py", "mine.py")],
)
def test_the_command_is_what_a_user_gives(monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "a b.yaml"])
    assert command() == f"{said} train 'a b.yaml'"


def test_the_command_of_a_rank_is_its_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTRAIN_ATTEMPT_DIR", "runs/it/attempts/0")
    monkeypatch.setattr("sys.argv", ["/usr/bin/bigtrain", "--debug", "train", "it.yaml", "launch.nproc=2"])
    assert command() == "bigtrain --debug launch it.yaml launch.nproc=2"
