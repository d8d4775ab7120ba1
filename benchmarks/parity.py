"""The table of docs/parity.md: three run files under every engine and axis, by `bigtrain parity`, in one table.

    python benchmarks/parity.py

It runs the commands that it prints, one after another, and takes tens of minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import Any

_ALL = "--engines single,ddp,fsdp,deepspeed:0,deepspeed:1,deepspeed:2,deepspeed:3 --world-sizes 2"
_GPT = "model.args.layers=2 model.args.width=64 data.args.context=64 data.batch_size=8"
COMMANDS = {
    "quickstart": [f"configs/quickstart.yaml --steps 20 {_ALL}"],
    "gpt": [f"configs/gpt.yaml {_GPT} --steps 10 {_ALL}"],
    # In bf16 with images of 32: with 16 the last convolutions see one pixel, and oneDNN's gradient of those is wrong
    # (plain torch, 16 tries of 20).
    "resnet": [
        f"configs/resnet_digits.yaml data.batch_size=4 data.args.size=16 --steps 5 --precisions fp32,fp64 {_ALL}",
        f"configs/resnet_digits.yaml data.batch_size=4 data.args.size=32 --steps 5 --precisions bf16 {_ALL}",
    ],
}
AXES = ("engine", "world_size", "accumulation", "recompute", "compiled", "precision")
HEADINGS = ("engine", "processes", "accumulation", "recomputed", "compiled", "precision", *COMMANDS)


def measured(name: str) -> list[dict[str, Any]]:
    """What `bigtrain parity` found."""
    found: list[dict[str, Any]] = []
    for arguments in COMMANDS[name]:
        command = [sys.executable, "-m", "bigtrain", "parity", *arguments.split(), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in (0, 1, 3):
            raise SystemExit(f"{name}: exit code {done.returncode}")
        found += json.loads(done.stdout)["verdicts"]
    return found


def cell(row: dict[str, Any] | None) -> str:
    """The largest differences of loss, norm and parameters, and the verdict where it is not "same"."""
    if row is None:
        return ""
    is_exact = row["variant"]["precision"] != "bf16"
    last = f"{row['parameters']:.0e}" if is_exact else f"× {row['parameters']:.2f}"
    worst = f"{row['loss']:.0e}, {row['norm']:.0e}, {last}"
    return worst if row["outcome"] == "same" else f"{worst} **{row['outcome']}**"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = {name: measured(name) for name in COMMANDS}
    tables = {name: {tuple(row["variant"][axis] for axis in AXES): row for row in rows} for name, rows in found.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    print(f"{versions}, Python {platform.python_version()}\n")
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for axes in dict.fromkeys(axes for rows in tables.values() for axes in rows):
        print("| " + " | ".join([*map(str, axes), *(cell(rows.get(axes)) for rows in tables.values())]) + " |")


if __name__ == "__main__":
    main()
