"""What a user meant and wrote otherwise is proposed: commands' options and runs' names."""

from __future__ import annotations

import sys

import pytest

from bigtrain.cli import main


@pytest.fixture
def told(monkeypatch, capsys, tmp_path):
    """Runs a command line where there are runs of two names; returns its exit code and what it says of errors."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "gpt-small"):
        (tmp_path / "runs" / name / "attempts").mkdir(parents=True)

    def call(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bigtrain", *args])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize("option", ["--nproc", "--nodes", "--target", "--profile", "--detach", "--dry-run"])
def test_options_of_launch_lead_to_launch(told, option):
    code, err = told("train", "my run.yaml", option, "2", "optim.lr=1")
    assert code == 2
    assert f"takes no {option}" in err
    assert f"do: bigtrain launch 'my run.yaml' {option} 2 optim.lr=1\n" in err


def test_an_option_that_nobody_knows_is_told_as_before(told):
    code, err = told("train", "run.yaml", "--nope")
    assert code == 2
    assert "No such option: --nope" in err


@pytest.mark.parametrize(
    "command",
    [
        ("report", "digts"),
        ("runs", "show", "digts"),
        ("runs", "compare", "digts", "gpt-small"),
        ("eval", "digts"),
        ("eval", "digts", "--best"),
        ("replay", "digts", "--step", "3"),
        ("ckpt", "show", "digts"),
        ("ckpt", "show", "runs/digts"),
        ("ckpt", "verify", "digts", "--best"),
        ("ckpt", "diff", "digts", "gpt-small"),
        ("ckpt", "prune", "digts"),
    ],
)
def test_a_run_that_is_misspelt_is_answered_with_the_nearest(told, command):
    code, err = told(*command)
    assert code != 0
    assert "do: did you mean digits?\n" in err


def test_a_run_that_nothing_is_near_to_is_answered_with_what_there_is(told):
    assert "do: runs in runs: digits, gpt-small\n" in told("ckpt", "show", "zzzz")[1]
