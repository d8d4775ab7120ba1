"""A real SLURM of two nodes on this machine: its own configuration, keys, ports and state, all in one folder.

munged, slurmctld and two slurmd run as root on loopback; nothing of an installed SLURM is read or changed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")

_CONFIGURATION = """
ClusterName=bigtrain-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=5
KillWait=10
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldParameters=preempt_send_user_signal
SwitchType=switch/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL             PriorityTier=10 PreemptMode=OFF
"""


def missing_daemons() -> list[str]:
    """What this machine lacks for it."""
    lacking = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    return lacking if os.geteuid() == 0 else ["the rights of root", *lacking]


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


class Cluster:
    """Two nodes, n1 and n2, of two CPUs each; partitions `low`, which is preempted by requeueing, and `high`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname()
        text = _CONFIGURATION.format(folder=self.folder, host=host, ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        self._start("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                    f"--key-file={key}", f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/seed",
                    f"--log-file={self.folder}/munged.log")  # fmt: skip
        self._until(lambda: (self.folder / "munge.socket").exists(), 10)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self._until(lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, 30)

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything that it runs, as a crash of the machine would."""
        self._processes[node].kill()
        self._processes.pop(node).wait()
        self._kill_tasks(node)

    def _kill_tasks(self, node: str) -> None:
        """Kill what runs on a node: its step daemons are children of nobody, and known by their tasks."""
        for process in psutil.process_iter(["environ"]):
            held = process.info["environ"] or {}
            if held.get("SLURMD_NODENAME") == node and held.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                with suppress(psutil.NoSuchProcess):
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        parent.kill()
                    process.kill()

    def _start(self, name: str, *command: str) -> None:
        environment = {**os.environ, **self.environment, "PATH": _path()}
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")

    def stop(self) -> None:
        for node in ("n1", "n2"):
            self._kill_tasks(node)
        for name in ("n1", "n2", "slurmctld", "munged"):
            if name in self._processes:
                process = self._processes.pop(name)
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def call(self, *command: str, check: bool = False) -> str:
        """Run a command of the cluster's and return what it prints."""
        environment = {**os.environ, **self.environment, "PATH": _path()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def state(self, number: str) -> str:
        return self.job(number).get("JobState", "UNKNOWN")

    def until_state(self, number: str, *states: str, timeout_s: float = 90) -> str:
        self._until(lambda: self.state(number) in states, timeout_s)
        return self.state(number)

    def _until(self, condition: Callable[[], Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.logs()))
            time.sleep(0.2)

    def logs(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix in (".log", ".out")]
