"""The `bigtrain` command as a user meets it: what it prints, what it exits with, what it does not import."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import bigtrain
from bigtrain.cli import main
from bigtrain.config.keys import all_keys

QUICKSTART = "configs/quickstart.yaml"
HEAVY = ("torch", "torchvision", "torchmetrics", "numpy", "sklearn", "tokenizers", "xxhash")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


@pytest.fixture
def bt(monkeypatch, capsys):
    """Runs a command line in this process; returns its exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bigtrain", *args])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


def test_check_says_ok(bt):
    assert bt("config", "check", QUICKSTART, "optim.lr=3e-4") == (0, f"ok: {QUICKSTART}\n", "")


def test_check_lists_everything_that_is_wrong(bt):
    code, out, err = bt("config", "check", QUICKSTART, "optm.lr=1", "train.epochs=-1", "checkpoint.weights=some")
    assert (code, out) == (2, "")
    assert len(re.findall("^error: command line: ", err, re.MULTILINE)) == 3
    assert "did you mean: optim\n" in err
    assert "checkpoint.weights: some does not fit" in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_an_error_and_debug_adds_the_traceback(bt):
    code, _, err = bt("config", "check", "quickstrat.yaml")
    assert (code, err.splitlines()[0]) == (2, "error: there is no file quickstrat.yaml")
    code, _, err = bt("--debug", "config", "check", "quickstrat.yaml")
    assert code == 2
    assert err.startswith("Traceback")


def test_an_error_of_another_kind_shows_what_the_command_called(bt, monkeypatch):
    def broken(*given, **named):
        return [][1]

    monkeypatch.setattr("bigtrain.config.loader.check", broken)
    code, _, err = bt("config", "check", QUICKSTART)
    assert code == 1
    assert re.findall('File ".*/(.+)", line', err) == ["test_config_commands.py"]
    assert err.endswith("IndexError: list index out of range\n")


@pytest.mark.parametrize(
    "words", ["runs list", "runs logs a", "report a", "runs compare a b", "config keys optim", "init", "--help"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_said_in_a_line(tmp_path, words, unbuffered):
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "attempts/0/logs").mkdir(parents=True)
        (tmp_path / "runs" / name / "attempts/0/logs/rank-00000.stdout").write_text("step 1\n")
        (tmp_path / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "epoch": 0}\n')
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "bigtrain", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    said = "error: standard output takes nothing: No space left on device\n  do: print to a place that takes it\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_an_error_has_its_code_also_where_it_cannot_be_said(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "bigtrain", "runs", "show", "nothing"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=full, stderr=full, check=False)
    assert done.returncode == 2


def test_show_prints_a_run_file(bt, tmp_path):
    code, out, _ = bt("config", "show", QUICKSTART, "optim.lr=3e-4")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["optim"]["lr"] == 0.0003
    assert shown["run"]["name"] == "quickstart"
    (tmp_path / "again.yaml").write_text(out)
    assert bt("config", "show", str(tmp_path / "again.yaml"))[1] == out


def test_show_says_where_values_came_from(bt):
    _, out, _ = bt("config", "show", QUICKSTART, "optim.lr=3e-4", "--origin")
    origins = {line.split()[0]: line.split(maxsplit=2)[2] for line in out.splitlines()}
    number = next(n for n, line in enumerate(Path(QUICKSTART).read_text().splitlines(), 1) if "batch_size" in line)
    assert origins["optim.lr"] == "command line"
    assert origins["data.batch_size"] == f"{QUICKSTART}:{number}"
    assert origins["optim.clip_grad_norm"] == "default"


def test_keys_lists_every_key_or_those_of_a_section(bt):
    _, out, _ = bt("config", "keys")
    assert {line.split()[0] for line in out.splitlines() if line[:1].strip()} >= {key.path for key in all_keys()}
    _, out, _ = bt("config", "keys", "optim.schedule")
    assert "linearly" in out
    assert "optim.lr " not in out
    code, _, err = bt("config", "keys", "optm")
    assert code == 2
    assert "did you mean: optim" in err


def test_schema_prints_json(bt):
    assert json.loads(bt("config", "schema")[1])["properties"]["train"]["description"]


def test_the_version_is_that_of_the_package(bt):
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    assert bt("--version") == (0, f"bigtrain {declared}\n", "")


def test_what_is_no_command_is_refused(bt):
    code, _, err = bt("config", "chekc")
    assert code == 2
    assert "chekc" in err


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["config", "check", QUICKSTART], ["config", "keys"]])
def test_it_starts_without_anything_heavy(args):
    script = (
        "import sys\n"
        "from bigtrain.cli import main\n"
        f"sys.argv = ['bigtrain', *{args!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n    assert not left.code, left.code\n"
        f"print('imported:', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain", "config", "check", "x.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no file x.yaml")


def test_the_package_offers_its_names_and_no_others():
    assert {"Config", "Run", "load_config", "train"} <= set(dir(bigtrain))
    assert bigtrain.load_config(QUICKSTART).config.run.name == "quickstart"
    assert bigtrain.Config.__name__ == "Config"
    with pytest.raises(AttributeError, match="trian"):
        _ = bigtrain.trian
