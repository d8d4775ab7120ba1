"""What a run can be made again from: the code, the packages, the machine, the command; written into its folder.

    repro/commit        the commit that the working directory is at
    repro/diff.patch    what was changed since, files that git does not know among it by name
    repro/packages.txt  every installed package with its version
    repro/machine.json  the rest

A later start that finds something else keeps it beside the first, in repro/attempt-<n>/. No variable of the
environment is kept: passwords lie there.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bigtrain.runs import ATTEMPT_VARIABLE, write_atomically

_SECONDS_FOR_GIT = 5.0
_LARGEST_DIFF = 2_000_000  # bytes; a folder of data that nobody told git to leave out is no change of code


def write_repro(folder: Path, attempt: int, devices: Sequence[str] = ()) -> list[str]:
    """Write what a run can be made again from; of a later start only what has changed since the first.

    Args:
        folder: The run folder.
        attempt: Which start of the run this is.
        devices: The names of the GPUs.

    Returns:
        The names of the files that differ from the first start's.
    """
    found = {
        **_code(folder),
        "packages.txt": _packages(),
        "machine.json": json.dumps(_machine(devices), indent=2) + "\n",
    }
    first = folder / "repro"
    is_first = not first.exists()
    target = first if is_first else first / f"attempt-{attempt}"
    changed = [name for name, text in found.items() if is_first or _read(first / name) != text]
    for name in changed:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, found[name])
    return [] if is_first else changed


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _code(run: Path) -> dict[str, str]:
    commit = _git("rev-parse", "HEAD").strip()
    if not commit:
        return {"commit": "not in a git repository\n"}
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff")
    if len(diff) > _LARGEST_DIFF:
        diff = diff[:_LARGEST_DIFF] + f"\n… cut: {len(diff)} bytes\n"
    unknown = _git("ls-files", "--others", "--exclude-standard").splitlines()
    unknown = [name for name in unknown if not Path(name).absolute().is_relative_to(run.absolute())]
    names = "".join(f"# not known to git: {name}\n" for name in unknown[:200])
    return {"commit": commit + "\n", "diff.patch": names + diff}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_FOR_GIT,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def command() -> str:
    """What started this process, as a shell takes it; of a rank that the launcher started, what started that."""
    program, given = Path(sys.argv[0]), sys.argv[1:]
    name = program.parent.name if program.name == "__main__.py" else program.name
    if ATTEMPT_VARIABLE in os.environ and "train" in given:
        given[given.index("train")] = "launch"
    return shlex.join([name, *given])


def _packages() -> str:
    found = {dist.name: dist.version for dist in metadata.distributions() if dist.name}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def _machine(devices: Sequence[str]) -> dict[str, Any]:
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    is_changed = bool(_git("status", "--porcelain", "--untracked-files=no").strip())
    return {
        "command": command(),
        "directory": str(Path.cwd()),
        "commit": f"{commit} with changes" if commit and is_changed else commit or None,
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{_memory_gib():.1f} GiB" if _memory_gib() else None,
        "gpus": list(devices),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        return 0.0
