"""The machine: cores, shared memory, limits, ports, and the disk of the run folders."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from bigtrain.doctor.findings import ERROR, OK, WARNING, Finding

_LEAST_SHM = 2**30
_SHM_OF_RANK = 2**28
_LEAST_FILES = 4096
_LEAST_FREE = 10 * 2**30
_SLOW_BYTES_PER_S = 50e6
_WRITTEN = 64 * 2**20
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "weka", "cifs", "smb", "afs", "glusterfs", "orangefs", "daos")


def cores(nproc: int) -> list[Finding]:
    """Whether each process has a core of its own, and no more threads than cores."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if nproc > count:
        text = f"{nproc} processes on {count} cores"
        return [Finding(WARNING, "cores", text, f"set launch.nproc to at most {count}: they take turns otherwise")]
    given = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, count // nproc)
    if given.isdecimal() and int(given) > share:
        text = f"OMP_NUM_THREADS={given}, and each of {nproc} processes has {share} of {count} cores"
        return [Finding(WARNING, "cores", text, "unset OMP_NUM_THREADS: the launcher gives each process its share")]
    return [Finding(OK, "cores", f"{count}: {share} for each of {nproc} process{'es' if nproc > 1 else ''}")]


def shared_memory(nproc: int) -> list[Finding]:
    """Whether /dev/shm, through which data workers and NCCL hand over what they have, is large enough."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return [Finding(WARNING, "/dev/shm", "is not there", "set data.workers=0, or mount a tmpfs there")]
    free, needed = shutil.disk_usage(path).free, max(_LEAST_SHM, nproc * _SHM_OF_RANK)
    text = f"{free / 2**30:.1f} GiB free"
    if free < needed:
        remedy = (
            f"have at least {needed / 2**30:.0f} GiB (docker run --shm-size=…, or --ipc=host), or set data.workers=0"
        )
        return [Finding(WARNING, "/dev/shm", text, remedy)]
    return [Finding(OK, "/dev/shm", text)]


def open_files() -> list[Finding]:
    """How many files and connections a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        can = (
            "" if hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES else " (an administrator must raise the limit)"
        )
        return [Finding(WARNING, "open files", f"at most {soft}", f"ulimit -n {_LEAST_FILES} before the start{can}")]
    return [Finding(OK, "open files", f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")]


def ports() -> list[Finding]:
    """Whether processes can meet on this machine, and the machine's own name leads to it."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        text = f"no port can be opened on 127.0.0.1: {error.strerror}"
        return [Finding(ERROR, "network", text, "processes meet over loopback: let them (container, firewall)")]
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = "add a line with it to the hosts file: on several nodes, others find the first one by its name"
        return [Finding(WARNING, "network", f"the machine's name {name} leads nowhere", remedy)]
    return [Finding(OK, "network", f"{name} is {address}; ports can be opened")]


def disk(folder: Path) -> list[Finding]:
    """Free space, speed and kind of the disk of the run folders."""
    there = folder.absolute()
    while not os.path.exists(there):
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return [
            Finding(ERROR, "run folder", f"no permission to write in {there}", "set run.dir to a folder of your own")
        ]
    free, kind = shutil.disk_usage(there).free, file_system(there)
    findings = [Finding(OK, "run folder", f"{there} ({kind}): {free / 2**30:.1f} GiB free")]
    if free < _LEAST_FREE:
        remedy = "checkpoint.keep bounds how many checkpoints stay; or set run.dir to a larger disk"
        findings[0] = Finding(WARNING, "run folder", f"{free / 2**30:.1f} GiB free in {there}", remedy)
    if kind in ("tmpfs", "overlay"):
        text = f"{there} is a {kind}: it is gone with the machine or the container"
        findings.append(Finding(WARNING, "run folder", text, "set run.dir to a disk that stays"))
    elif kind.startswith(_SHARED) or kind.removeprefix("fuse.").startswith(_SHARED):
        findings.append(Finding(OK, "run folder", f"{kind}: other nodes can see it, if they mount it"))
    else:
        findings.append(Finding(OK, "run folder", f"{kind}: of this machine alone, so not for runs on several nodes"))
    return [*findings, _speed(there, free)]


def _speed(folder: Path, free: int) -> Finding:
    if free < 2 * _WRITTEN:
        return Finding(ERROR, "disk speed", f"{free / 2**20:.0f} MiB free", "make room")
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".bigtrain-doctor-") as file:
        began = time.perf_counter()
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = _WRITTEN / (time.perf_counter() - began)
    text = f"{speed / 1e6:.0f} MB/s written and synced"
    if speed < _SLOW_BYTES_PER_S:
        return Finding(
            WARNING, "disk speed", text, "checkpoints will take long: save less often, or set run.dir elsewhere"
        )
    return Finding(OK, "disk speed", text)


def file_system(path: Path) -> str:
    """The kind of file system that a path lies on, as the system calls it."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    mounts = [(Path(parts[1].replace("\\040", " ")), parts[2]) for line in lines if len(parts := line.split()) > 2]
    holding = [(len(mount.parts), kind) for mount, kind in mounts if path.resolve().is_relative_to(mount)]
    return max(holding, default=(0, "unknown"), key=lambda pair: pair[0])[1]
