"""What is submitted, byte for byte: a pure function of plan and profile, held by files in golden/.

After a change that is meant: BIGTRAIN_GOLDEN=write python -m pytest tests/launchers/test_rendering.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config.loader import from_dict
from bigtrain.config.schema import Config
from bigtrain.errors import ConfigError, SetupError
from launchers.allocate import prepared
from launchers.plan import LaunchPlan
from launchers.profiles import Profile, load_profile
from launchers.slurm import Submission
from launchers.snapshot import Snapshot
from launchers.steps import RankEnd, read_ends, step_command

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]

EVERYTHING: dict[str, Any] = {
    "partition": "a-partition",
    "account": "an-account",
    "qos": "a-qos",
    "time": "1-02:30:00",
    "gpus_per_node": 8,
    "cpus_per_task": 12,
    "mem": "200G",
    "mem_per_gpu": "25G",
    "constraint": "a100&nvlink",
    "exclude": "bad[1-3]",
    "nodelist": "good[1-4]",
    "reservation": "a-reservation",
    "exclusive": True,
    "array": 3,
    "requeue": False,
    "signal_s": 77,
    "comment": "a comment with spaces",
    "mail_type": "END,FAIL",
    "mail_user": "someone@example.org",
    "setup": ["module load cuda/12", "source /opt/venv/bin/activate"],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0"},
    "container": {"image": "image.sif", "runtime": "apptainer exec --nv", "mounts": ["/data:/in"], "python": "py3"},
    "sbatch": ["--gres=tmpfs:100G", "--no-kill"],
    "srun": ["--cpu-bind=cores"],
}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")


def rendered(profile: Profile, nodes: int, nproc: int) -> str:
    plan = LaunchPlan(nproc, ("bigtrain", "train", "/runs/it/attempts/0/submit/run.yaml"), {}, nodes=nodes)
    code = Snapshot((Path("/runs/it/attempts/0/submit/code"),), Path("/runs/it/attempts/0/submit/code"))
    submission = Submission("it", plan, profile, Path("/runs/it/attempts/0/submit"), code)
    command = step_command(plan, profile, Path("/runs/it/attempts/0"), "bigtrain-0")
    return "\n".join([submission.text(), "---", *command, "---", submission.words(), ""])


def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BIGTRAIN_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_every_option_at_once() -> None:
    assert EVERYTHING.keys() == Profile.model_fields.keys()
    text = rendered(Profile.model_validate(EVERYTHING), nodes=4, nproc=8)
    check("everything.txt", text)
    for name, value in EVERYTHING.items():
        words = {"time": ["1590"], "array": ["0-2%1"], "requeue": ["no-requeue"], "exclusive": ["exclusive"]}.get(name)
        if name == "environment":
            continue  # it reaches ranks through their environment, and stands in no file
        if words is None:
            given = value if isinstance(value, (str, int)) else [*value.values()] if isinstance(value, dict) else value
            words = [str(word) for word in ([given] if isinstance(given, (str, int)) else given)]
        for word in words:
            assert word.strip("[]'") in text.replace("\n", " "), name


@pytest.mark.parametrize("name", ["gpu", "cpu", "preemptible"])
def test_the_profiles_that_come_with_it(name: str) -> None:
    profile = Profile.model_validate(yaml.safe_load((ROOT / "slurm" / f"{name}.yaml").read_text()))
    nproc = profile.gpus_per_node or 2
    check(f"{name}.txt", rendered(profile, nodes=2, nproc=nproc))


def test_a_container_of_pyxis_and_one_log_a_node() -> None:
    profile = Profile.model_validate({"container": {"image": "nvcr.io#nvidia/pytorch", "mounts": ["/a:/a", "/b:/b"]}})
    check("pyxis.txt", rendered(profile, nodes=9, nproc=8))


def config(**launch: Any) -> Config:
    base = {"task": "regression", "model": "gpt", "data": {"name": "digits"}, "train": {"steps": 1}}
    return from_dict({**base, "launch": launch}).config


def test_a_profile_is_changed_by_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = load_profile(config(profile="gpu", slurm={"partition": "other", "gpus_per_node": 4}))
    assert (profile.partition, profile.gpus_per_node, profile.exclusive) == ("other", 4, True)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/gpu.yaml").write_text("partition: mine\n")  # the one here goes before the one that comes with it
    assert load_profile(config(profile="gpu")).partition == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: x\n", ["a profile has no key partitoin", "did you mean: partition", ":1"]),
        ("time: soon\n", ["time: 'soon' is not a time", "hours:minutes:seconds"]),
        ("gpus_per_node: many\n", ["gpus_per_node: 'many' does not fit"]),
        ("container: {imag: x}\n", ["a profile has no key container.imag", "did you mean: image"]),
        ("qos: a\nqos: b\n", ["qos is given twice"]),
    ],
)
def test_a_profile_with_something_wrong(tmp_path: Path, text: str, said: list[str]) -> None:
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(config(profile=str(tmp_path / "it.yaml")))
    told = str(caught.value)
    assert all(word in told for word in said), told


def test_a_path_that_the_scheduler_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("time: 1\n")
    named = from_dict(config(profile=str(tmp_path / "it.yaml")).model_dump(), ["run.name=10%jitter"]).config
    with pytest.raises(SetupError, match="has a %, with which SLURM's own words in names of files begin"):
        prepared(named, tmp_path / "it.yaml", debug=False)


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(SetupError, match="there is no profile 'gpuu'") as caught:
        load_profile(config(profile="gpuu"))
    assert "cpu, gpu, preemptible" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("time", "minutes"), [("30", 30), ("01:30", 2), ("02:00:00", 120), ("1-12", 2160), ("1-00:30:01", 1471), (90, 90)]
)
def test_times(time: str | int, minutes: int) -> None:
    """As in sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes:seconds."""
    assert Profile.model_validate({"time": time}).minutes == minutes


def test_what_the_step_command_says_of_tasks() -> None:
    said = """\
srun: error: n1: task 1: Killed
srun: error: n2: tasks 2-3,7: Exited with exit code 75
srun: error: n3: task 9: Segmentation fault (core dumped)
srun: error: n3: task 10: Terminated
slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2030-01-01T00:00:00 ***
"""
    assert read_ends(said) == [
        RankEnd(1, -9), RankEnd(2, 75), RankEnd(3, 75), RankEnd(7, 75), RankEnd(9, -11)
    ]  # fmt: skip
