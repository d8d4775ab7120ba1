"""docs/evaluating.md: its run file trains, and its commands do what they say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import bigtrain
from bigtrain.cli import app

TEXT = (Path(__file__).parents[2] / "docs/evaluating.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for kind, text in FENCE.findall(TEXT) if not kind for line in text.splitlines()]
    quoted = [re.sub(r"(eval=\{.*\})", r"'\1'", line) for line in lines]
    return [shlex.split(line)[1:] for line in quoted]


@pytest.mark.slow
def test_the_run_file_and_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run_file,) = [text for kind, text in FENCE.findall(TEXT) if kind == "yaml"]
    (tmp_path / "run.yaml").write_text(run_file)
    bigtrain.train("run.yaml", ["engine.device=cpu", "track.progress=none"])
    Path("pictures/of_more").mkdir(parents=True)
    for name in ("a.png", "b.png", "pictures/c.png", "pictures/of_more/d.png"):
        Image.new("L", (8, 8), 90).save(name)
    said = {}
    for words in commands():
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        said[" ".join(words)] = done.stdout
    assert len(said) == 8
    measured = json.loads(said["eval run --json"])["metrics"]
    reported = json.loads(Path("runs/run/result.json").read_text())
    assert measured["loss"] == reported["metrics"]["loss"]
    assert f"accuracy      {reported['best']['value']:.6g}" in said["eval run --best"]
    assert said["eval run --no-ema"] != said["eval run"]
    assert "898 samples" in said["eval run --data eval={split: 0.5}"]
    assert said["predict run a.png b.png"].count("a.png") == said["predict run a.png b.png"].count("b.png") == 1
    assert all(f"pictures/{name}" in said["predict run pictures/"] for name in ("c.png", "of_more/d.png"))
    assert said["predict run a.png --csv"].startswith("input,class,probability,label\na.png,")
