"""Runs that are started as a user would, by the command, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from bigtrain.tracking.reading import read_rows

ROOT = Path(__file__).parents[2]

# What the clock and the machine's memory say differs from run to run; nothing else may.
CLOCKS = ("_s", "time", "_bytes", "_rank", "mfu")

TASK = '''
"""What is planted in ranks, by a file: its name says what, its text in which rank; it happens once."""

import ctypes, os, signal, time
import torch
import torch.distributed as dist
from bigtrain.tasks.causal_lm import CausalLM

RANK = int(os.environ.get("RANK", 0))


def text_of(path):
    try:
        return open(path).read().strip()
    except FileNotFoundError:  # the rank that it was for has taken it since
        return ""


class Planted(CausalLM):
    def __init__(self, folder, after, **args):
        super().__init__(**args)
        self.folder, self.after, self.calls = folder, after, 0
        self.group = dist.new_group() if dist.is_initialized() else None

    def loss(self, model, batch):
        self.calls += 1
        if os.path.exists(os.path.join(self.folder, "..", "slowly")):
            time.sleep(0.1)
        if self.calls == self.after and os.path.exists(os.path.join(self.folder, "..", "skips")):
            if open(os.path.join(self.folder, "..", "skips")).read() != str(RANK):
                dist.all_reduce(torch.zeros(1), group=self.group)
        if self.calls == self.after and os.path.exists(os.path.join(self.folder, "..", "other_order")):
            calls = [lambda: dist.all_reduce(torch.zeros(1), group=self.group), lambda: dist.barrier(group=self.group)]
            for call in calls if RANK else reversed(calls):
                call()
        if self.calls == self.after and torch.is_grad_enabled():
            for name in os.listdir(self.folder):
                path = os.path.join(self.folder, name)
                if text_of(path) == str(RANK):
                    os.unlink(path)
                    self.model = model
                    getattr(self, name)()
        return super().loss(model, batch)

    def killed(self): os.kill(os.getpid(), signal.SIGKILL)
    def segfault(self): os.kill(os.getpid(), signal.SIGSEGV)
    def aborts(self): os.abort()
    def exits(self): os._exit(3)
    def leaves(self): os._exit(0)
    def raises(self): raise ZeroDivisionError("planted")
    def no_memory(self): raise MemoryError("planted")
    def network(self): raise ConnectionResetError("planted")
    def stopped(self):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # the kernel may stop another thread first, and this one some instructions later

    def sleeps(self): time.sleep(600)
    def holds_the_lock(self): ctypes.PyDLL(None).sleep(600)
    def flips(self): next(iter(self.model.parameters())).data.view(-1)[0] += 1e-3
    def slow_from_now(self): self.loss = self._slow

    def _slow(self, model, batch):
        time.sleep(0.3)
        return super().loss(model, batch)
'''


def run_file(folder: Path, name: str = "it", *, plant: bool = False, **changes: Any) -> Path:
    """A small gpt with dropout, accumulation, clipping and a schedule.

    With `plant`, files in `planted/` say what goes wrong, and steps take long while there is a file `slowly`.
    """
    args = {"vocab": 257, "context": 32, "layers": 2, "heads": 2, "width": 32, "dropout": 0.1}
    run: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs"), "deterministic": True, "threads": 1},
        "task": "causal_lm",
        "model": {"name": "gpt", "args": args},
        "data": {
            "name": "synthetic",
            "args": {"kind": "causal_lm", "samples": 64, "context": 32, "vocab": 257},
            "batch_size": 8,
        },
        "train": {"steps": 40, "micro_batch_size": 2},
        "optim": {"clip_grad_norm": 1.0, "schedule": {"name": "cosine", "warmup_steps": 5}},
        "engine": {"name": "ddp", "device": "cpu"},
        "checkpoint": {"every_steps": 5},
        "track": {"log_every": 1, "progress": "plain", "wandb": "disabled"},
    }
    if plant:
        (folder / "planted").mkdir(exist_ok=True)
        (folder / "planting.py").write_text(TASK)
        run["task"] = {"name": "planting:Planted", "args": {"folder": str(folder / "planted"), "after": 15}}
    for section, values in changes.items():
        run[section] = {**run.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def bigtrain(folder: Path, *arguments: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The same, in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "bigtrain", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def numbers(path: Path) -> list[dict[str, Any]]:
    """The merged series of a run: every number exactly, the clock's left out."""
    rows = [row for row in read_rows(path) if "event" not in row]
    return [{key: value for key, value in row.items() if not key.endswith(CLOCKS)} for row in rows]


def last_step(path: Path) -> int:
    """How far a run has come."""
    try:
        return max((row["step"] for row in numbers(path)), default=0)
    except Exception:  # it has not begun
        return 0


def until(condition: Callable[[], Any], timeout_s: float = 60, what: str = "it") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about in {timeout_s} s"
        time.sleep(0.1)


def ranks_of(path: Path) -> list[int]:
    """The processes that train a run, by its run file, rank 0 first where a launcher here forked them."""
    forked, started = [], []
    for process in psutil.process_iter(["pid", "cmdline", "ppid", "name"]):
        words = process.info["cmdline"] or []
        if process.info["name"].startswith("bigtrain-"):
            with suppress(psutil.NoSuchProcess):  # another test's, which ends just now
                if any(str(path) in ancestor.cmdline() for ancestor in process.parents()):
                    rank = int(process.info["name"].removeprefix("bigtrain-"))
                    forked.append((rank, process.info["pid"], process.info["ppid"]))
        elif str(path) in words and "launchers.guarded" in words and "srun" not in words:
            started.append((process.info["pid"], process.info["pid"], process.info["ppid"]))
    found = sorted(forked or started)
    pids = {pid for _, pid, _ in found}
    return [pid for _, pid, parent in found if parent not in pids]  # data workers are children of ranks


def left_over(text: str) -> list[list[str]]:
    """Processes whose command line mentions something, or that work in such a folder."""
    found = []
    folder = str(Path(text).parent) if Path(text).is_file() else text
    for process in psutil.process_iter(["cmdline", "cwd", "name"]):
        if text in " ".join(process.info["cmdline"] or []) or folder in (process.info["cwd"] or ""):
            found.append([process.info["name"], *(process.info["cmdline"] or [])])
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
