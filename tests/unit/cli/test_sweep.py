"""`bigtrain sweep`, `report` and `runs compare` on real runs; completion for the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.cli.config import _complete_key
from bigtrain.cli.sweep import is_done, make_points, split_values
from bigtrain.config.loader import dump, load
from bigtrain.errors import UserError
from bigtrain.report import write_report

ROOT = Path(__file__).parents[3]
RUN_FILE = """
run: {name: base}
task: classification
model: {name: torchvision/resnet18, args: {num_classes: 10, in_channels: 1, norm_layer: group_norm}}
data: {name: digits, batch_size: 128}
train: {steps: 2}
eval: {max_batches: 1}
"""
SMALL = RUN_FILE.replace(
    "{name: torchvision/resnet18, args: {num_classes: 10, in_channels: 1, norm_layer: group_norm}}", "my_model:make"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "it.yaml").write_text(SMALL)
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\ndef make(width=16):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    return tmp_path


def bigtrain(folder: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", **variables}
    command = [sys.executable, "-m", "bigtrain", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("adamw", ["adamw"]),
        ("[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("{a: 1, b: 2}, {a: 3}", ["{a: 1, b: 2}", "{a: 3}"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets(text: str, values: list[str]) -> None:
    assert list(split_values(text)) == values


def test_every_combination_has_a_name_of_its_own(folder: Path) -> None:
    keys, points = make_points(folder / "it.yaml", ["optim.lr=0.1,0.2", "run.seed=1,2", "train.steps=3"])
    assert keys == ["optim.lr", "run.seed"]
    assert [point.name for point in points] == [
        *("base-lr0.1-seed1", "base-lr0.1-seed2", "base-lr0.2-seed1", "base-lr0.2-seed2"),
    ]
    assert points[1].changes == ("optim.lr=0.1", "run.seed=2", "train.steps=3", "run.name=base-lr0.1-seed2")
    _, points = make_points(folder / "it.yaml", ["model.args={width: 8},{width, 9}"])
    assert len({point.name for point in points}) == len(points)
    for grid, said in ((["optim.lr"], "gives no values"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(UserError, match=said):
            make_points(folder / "it.yaml", grid)


def test_what_is_wrong_with_any_is_said_before_the_first_begins(folder: Path) -> None:
    assert "optim.lr" in bigtrain(folder, "sweep", "it.yaml", "optim.lr=0.1,fast", code=2)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["engine.name=ddp", "launch.nproc=2"], True),
        (["train.steps=3"], False),
        (["train.steps=1"], "the run base is finished, and was another one: train.steps was 2 and is 1"),
        (["train.steps=3", "data.batch_size=64"], "was another one: data.batch_size was 128 and is 64"),
    ],
)
def test_a_run_that_was_another_one_is_not_taken_for_one_of_the_sweep(
    folder: Path, changes: list[str], said: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "runs/base").mkdir(parents=True)
    (folder / "runs/base/config.yaml").write_text(dump(load("it.yaml").config))
    (folder / "runs/base/result.json").write_text("{}")
    wanted = load("it.yaml", changes).config
    if isinstance(said, bool):
        assert is_done(wanted) == said
    else:
        with pytest.raises(UserError, match=said):
            is_done(wanted)


@pytest.mark.slow
def test_a_sweep_its_table_and_the_comparison_of_its_runs(folder: Path) -> None:
    grid = ["optim.lr=1e-3,1e-1", "--sort", "eval/accuracy"]
    assert "base-lr1e-1" in bigtrain(folder, "sweep", "it.yaml", *grid, "--dry-run")
    out = bigtrain(folder, "sweep", "it.yaml", *grid)
    table = out[out.rindex("run  ") :].splitlines()
    assert table[0].split()[:2] == ["run", "optim.lr"]
    assert {row.split()[0] for row in table[1:3]} == {"base-lr1e-3", "base-lr1e-1"}
    column = table[0].split().index("eval/accuracy")
    scores = [float(row.split()[column]) for row in table[1:3]]
    assert scores == sorted(scores, reverse=True)
    assert bigtrain(folder, "sweep", "it.yaml", *grid).count("finished already") == 2

    out = bigtrain(folder, "runs", "compare", "base-lr1e-3", "base-lr1e-1", "--html", "both.html")
    differences, _, measures = out.partition("\n\n")
    assert differences.splitlines()[1].split() == ["optim.lr", "0.001", "0.1"]
    assert "eval/accuracy, best" in measures
    assert "base-lr1e-1" in (folder / "both.html").read_text()
    assert "report.html" in bigtrain(folder, "report", "base-lr1e-3")
    wrong = bigtrain(folder, "report", "base-lr1e-4", code=2)
    assert "did you mean base-lr1e-3 or base-lr1e-1?" in wrong


def test_nothing_is_proposed_for_a_value_that_is_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", "bigtrain train it.yaml optim.lr = ")
    monkeypatch.setenv("COMP_CWORD", "5")
    assert _complete_key("") == []
    monkeypatch.setenv("COMP_CWORD", "6")
    assert "optim.lr=" in _complete_key("opt")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bigtrain train it.yaml optim.sch", "optim.schedule.warmup_steps="),
        ("bigtrain train it.yaml engine.name = f", "fsdp"),  # bash takes the = for a word
        ("bigtrain train it.yaml run.deterministic =", "false"),
        ("bigtrain train it.yaml engine.name=f", "engine.name=fsdp"),  # other shells do not
        ("bigtrain report ", "first"),
        ("bigtrain runs show fi", "first"),
        ("bigtrain eval ", "first"),
        ("bigtrain init lan", "language-model"),
        ("bigtrain conv", "convert"),
    ],
)
def test_the_shell_completes(folder: Path, words: str, expected: str) -> None:
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "config.yaml").touch()
    code = "import sys; sys.argv[0] = 'bigtrain'; from bigtrain.cli import main; main()"
    last = len(words.split()) - (0 if words.endswith(" ") else 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_BIGTRAIN_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": words, "COMP_CWORD": str(last)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert expected in done.stdout.split("\n"), done.stdout + done.stderr


def test_runs_sorted_by_a_metric_and_names_that_are_hard_to_write(folder: Path) -> None:
    for name, metric in (("a b", 0.5), ("best", 0.9), ("worst", 0.1), ("none", None)):
        run = folder / "runs" / name
        (run / "attempts/0").mkdir(parents=True)
        row = '{"step": 3, "loss": 0.5, "epoch": 0}\n'
        last = "" if metric is None else f'{{"step": 3, "epoch": 0, "eval/accuracy": {metric}}}\n'
        (run / "metrics.jsonl").write_text(row + last)
    listed = bigtrain(folder, "runs", "list", "--sort", "eval/accuracy").splitlines()
    assert [line.split("  ")[0] for line in listed[1:]] == ["best", "a b", "worst", "none"]
    assert "0.9000" in listed[1]
    for metric in ("loss", "train/loss"):  # it has a column anyhow
        listed = bigtrain(folder, "runs", "list", "--sort", metric).splitlines()
        assert listed[0].split() == ["name", "state", "step", "loss", "since", "where"]
    assert "did you mean eval/accuracy?" in bigtrain(folder, "runs", "list", "--sort", "eval/acuracy", code=2)


def test_a_report_of_a_run_whose_name_is_no_text(folder: Path) -> None:
    name = os.fsdecode(b"runs/\xff\xfebad")
    (folder / name / "attempts/0").mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5, "epoch": 0}\n\xff\xfe\n')
    page = write_report(folder / name).read_text(encoding="utf-8")
    assert "??bad" in page
    assert "1 line of metrics.jsonl is damaged" in page


def test_a_run_whose_numbers_are_damaged_is_listed_with_the_others(folder: Path) -> None:
    for name, row in (("good", '"loss": 0.5'), ("bad", '"loss": null'), ("worse", '"event": "start", "time": "x"')):
        (folder / "runs" / name / "attempts/0/logs").mkdir(parents=True)
        (folder / "runs" / name / "metrics.jsonl").write_text(f'{{"step": 3, "epoch": 0, {row}}}\n')
    listed = bigtrain(folder, "runs", "list").splitlines()
    assert {line.split()[0] for line in listed[1:]} == {"good", "bad", "worse"}
