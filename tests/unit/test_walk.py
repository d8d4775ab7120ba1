"""The walk of a new user, as docs/tutorial.md shows it, and the examples of docs/tracking.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.config.loader import load
from tests.helpers.run_folders import make_run
from tests.unit.test_docs import blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_command_of_the_tutorial_does_what_it_should(tmp_path: Path) -> None:
    command = [sys.executable, "docs/walk.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "both.html").exists()


def test_the_tutorial_shows_what_its_commands_printed() -> None:
    for block in blocks("docs/tutorial.md", "console"):
        lines = block.splitlines()
        assert lines[0].startswith("$ ")
        assert len(lines) > 1
    text = (ROOT / "docs" / "tutorial.md").read_text()
    assert str(ROOT) not in text
    assert not re.search(r"/tmp/(?!bigtrain-try)|/home/", text)


def python(folder: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_a_run_as_the_page_shows_it(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "quickstart", steps=100)
    reading, _ = blocks("docs/tracking.md", "python")
    assert "'event': 'start'" in python(tmp_path, reading)


@pytest.mark.slow
def test_the_tracker_of_the_page(tmp_path: Path) -> None:
    _, tracker = blocks("docs/tracking.md", "python")
    (tmp_path / "my_tracker.py").write_text(tracker)
    (own,) = [text for text in blocks("docs/tracking.md", "yaml") if "my_tracker" in text]
    run_file = "task: classification\nmodel: simple_cnn\ntrain: {steps: 2}\nengine: {device: cpu}\n"
    data = {"name": "synthetic", "args": {"kind": "classification", "samples": 20}, "batch_size": 4, "eval": "none"}
    path = tmp_path / "it.yaml"
    path.write_text(f"{run_file}data: {json.dumps(data)}\n{own}")
    python(tmp_path, "import bigtrain; bigtrain.train('it.yaml', ['track.log_every=1'])")
    name, largest = (tmp_path / "largest.txt").read_text().split()
    assert name == "it"
    assert float(largest) > 1


def test_what_the_pages_say_of_the_run_file_loads(tmp_path: Path) -> None:
    texts = blocks("docs/tracking.md", "yaml") + blocks("docs/profiling.md", "yaml")
    assert len(texts) == 4
    for text in texts:
        path = tmp_path / "it.yaml"
        path.write_text(f"task: classification\nmodel: bigmodel\ndata: {{name: digits}}\ntrain: {{steps: 9}}\n{text}")
        load(path)
