"""The walk of a new user: train, watch, kill, go on, change the engine, compare, open the report.

    python docs/walk.py [FOLDER]            runs every command of docs/tutorial.md and checks what it should
    python docs/walk.py --write [FOLDER]    and writes what was printed into docs/tutorial.md

Commands stand in docs/tutorial.md in blocks that begin with `$ `; what they printed follows. Numbers, times and paths
differ from machine to machine: what must hold is checked here, in words of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LONGEST = 24  # lines of what a command printed

Check = Callable[[Path, str], None]


def main(arguments: list[str]) -> None:
    """Walk."""
    writes = "--write" in arguments
    given = [argument for argument in arguments if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(given[0] if given else made).absolute()
        folder.mkdir(exist_ok=True)
        (folder / "configs").symlink_to(ROOT / "configs")
        text = BLOCK.sub(lambda block: f"```console\n{_run_block(block[1], folder)}```", PAGE.read_text())
    if writes:
        PAGE.write_text(text)


def _run_block(block: str, folder: Path) -> str:
    shown = ""
    for line in block.splitlines():
        if line.startswith("$ "):
            command = line[2:]
            print(line, flush=True)
            printed = _run(command, folder)
            print(printed, flush=True)
            _check(command, folder, printed)
            shown += f"{line}\n{_short(printed.replace(f'{folder}/', ''))}"
    return shown


def _run(command: str, folder: Path) -> str:
    """Run a command; one that ends in `# killed` is killed after its second checkpoint, with all its processes."""
    words = shlex.split(command.partition(" #")[0])
    words = [sys.executable, "-m", *words] if words[0] == "bigtrain" else words
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110", "WANDB_MODE": "disabled"}
    with subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        if "# killed" in command:
            _kill_after_checkpoint(process.pid, folder)
            return _output(process)
        printed = _output(process)
    if process.returncode != 0:
        sys.exit(f"{command} ended with {process.returncode}:\n{printed}")
    return printed


def _output(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    printed = process.stdout.read()
    process.wait()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)


def _kill_after_checkpoint(pid: int, folder: Path) -> None:
    until = time.monotonic() + 240
    while len(list(folder.glob("runs/*/checkpoints/step-*/manifest.json"))) < 2:
        if time.monotonic() > until:
            sys.exit("there was no second checkpoint in time")
        time.sleep(0.05)
    for each in _tree(pid):
        os.kill(each, signal.SIGKILL)


def _tree(pid: int) -> list[int]:
    """A process and all below it, the lowest last."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += _tree(child)
    return found


def _short(printed: str) -> str:
    lines = [line.rstrip() for line in printed.splitlines()]
    if len(lines) > LONGEST:
        lines = [*lines[: LONGEST // 2], "…", *lines[-LONGEST // 2 :]]
    return "".join(f"{line}\n" for line in lines)


def _rows(folder: Path, run: str) -> list[dict[str, float]]:
    sys.path.insert(0, str(ROOT))
    from bigtrain import load_run

    return [row for row in load_run(folder / "runs" / run).rows if "loss" in row]


def _check(command: str, folder: Path, printed: str) -> None:
    for part, check in CHECKS.items():
        if part in command:
            check(folder, printed)


def _was_killed(folder: Path, printed: str) -> None:
    assert not (folder / "runs/first/result.json").exists()


def _went_on(folder: Path, printed: str) -> None:
    assert re.search(r"going on from step \d+, saved by fsdp on 2 processes", printed), printed
    steps = [row["step"] for row in _rows(folder, "first")]
    assert steps == list(range(5, steps[-1] + 1, 5)), steps  # no hole and no double
    result = json.loads((folder / "runs/first/result.json").read_text())
    assert (result["engine"], result["steps"]) == ("ddp", steps[-1])


def _is_the_same(folder: Path, printed: str) -> None:
    first, second = (_rows(folder, run) for run in ("first", "second"))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(first, second, strict=True)) < 1e-2


def _is_replayed(folder: Path, printed: str) -> None:
    assert [int(step) for step in re.findall(r"^step (\d+):", printed, re.MULTILINE)] == [41, 42, 43, 44, 45]
    again, before = re.findall(r"step 45: loss ([\d.e-]+).*the run had ([\d.e-]+)", printed)[0]
    assert abs(float(again) - float(before)) < 1e-3 * float(before)


def _has_report(folder: Path, printed: str) -> None:
    text = (folder / "runs/first/report.html").read_text()
    assert "went on from step" in text
    assert "<script" not in text


CHECKS: dict[str, Check] = {
    "# killed": _was_killed,
    "engine.name=ddp": _went_on,
    "run.name=second": _is_the_same,
    "report first": _has_report,
    "replay second": _is_replayed,
}

if __name__ == "__main__":
    main(sys.argv[1:])
