"""`bigtrain doctor`, on this machine and on ones that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.doctor import machine, software
from tests.helpers.launching import bigtrain, environment
from tests.helpers.slurm import Cluster


def test_text_json_and_exit_code_agree(tmp_path: Path) -> None:
    began = time.monotonic()
    done = bigtrain(tmp_path, "doctor", "--json", "--dir", str(tmp_path / "runs"), "--nproc=2")
    assert time.monotonic() - began < 30  # 15 s on a quiet machine
    findings = json.loads(done.stdout)
    assert {finding["what"] for finding in findings} >= {
        *("packages", "GPUs", "cores", "/dev/shm", "open files", "network", "run folder", "disk speed", "all-reduce")
    }  # fmt: skip
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok")
    levels = {finding["level"] for finding in findings}
    assert done.returncode == (2 if "error" in levels else 1 if "warning" in levels else 0)
    (reduced,) = [finding for finding in findings if finding["what"] == "all-reduce"]
    assert reduced["level"] == "ok"
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_lacking_is_said_with_what_to_do(tmp_path: Path) -> None:
    """Few open files, too many threads, and a folder that may not be written to: a user without rights."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    script = (
        "import os, resource, json\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from pathlib import Path\n"
        "from dataclasses import asdict\n"
        "from bigtrain.doctor import machine\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "found = [*machine.open_files(), *machine.cores(1), *machine.cores(4096)]\n"
        f"found += machine.disk(Path({str(locked)!r}))\n"
        "print(json.dumps([asdict(f) for f in found]))\n"
    )
    tmp_path.chmod(0o755)
    many = {**environment(), "OMP_NUM_THREADS": "4096"}
    done = subprocess.run([sys.executable, "-c", script], env=many, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [finding["level"] for finding in found] == ["warning", "warning", "warning", "error"]
    assert "ulimit -n 4096" in found[0]["remedy"]
    assert "unset OMP_NUM_THREADS" in found[1]["remedy"]
    assert "launch.nproc" in found[2]["remedy"]
    assert "no permission to write" in found[3]["text"]


def test_versions_that_clash_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = software.importlib.metadata.version
    monkeypatch.setattr(
        software.importlib.metadata, "version", lambda name: "0.9.0" if name == "torchvision" else real(name)
    )
    (finding,) = software.versions()
    assert finding.level == "error"
    assert finding.text.startswith("bigtrain asks for torchvision>=")
    assert finding.remedy.startswith('pip install "torchvision>=')


def test_the_kind_of_a_file_system() -> None:
    assert machine.file_system(Path("/proc/self")) == "proc"
    assert machine.file_system(Path("/dev/shm")) in ("tmpfs", "shm")


@pytest.mark.slow
def test_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    done = bigtrain(tmp_path, "doctor")
    assert "SLURM: version 22" in done.stdout or "SLURM: version 2" in done.stdout
    assert "preemption: announced, and requeued; time to save: low 10 s" in done.stdout
    assert "10 s between scancel and the end (KillWait)" in done.stdout
    assert os.environ["SLURM_CONF"].endswith("slurm.conf")
