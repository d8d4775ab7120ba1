"""Everything of the GPU path, checked and measured on one GPU in less than eight minutes.

    python benchmarks/gpu.py [--minutes 8] [--json FILE] [--only gpt_1b,vit]

It runs tests/gpu, then measures: a large product of bfloat16 matrices, which is what this GPU gives at this moment; a
gpt of 1.2B parameters, and one of 8B where its state fits; vit_l_16; and a smaller gpt with bigtrain, by hand, with
Lightning and with transformers' Trainer, as far as they are installed, which take turns (A B C C B A). A part that has
no time left or cannot run is left out, and the output says so. `--tiny --device cpu` runs the whole program with toy
sizes, to know that it runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: the 8B model leaves no memory for pieces that fit nowhere.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from gpu_peers import PEERS, Setting, gpt_on, seconds_a_step
from gpu_sizes import TINY, Bench, Sizes
from torch import Tensor

from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.models.gpt import GPT
from bigtrain.tracking.mfu import peak_flops
from bigtrain.trainer import Subject, assemble

ROOT = Path(__file__).parents[1]
SETTLING = 5  # steps that are not counted: compilation, allocation
# Bytes for each parameter of the 8B model: weights and gradients in float32, copies and two moments in bfloat16.
STATE_BYTES = 4 + 4 + 2 + 4
BF16_MOMENTS = {"moments": "bf16", "args": {"betas": [0.9, 0.95]}}

Row = dict[str, Any]


# ---- parts ----------


def environment(bench: Bench, deadline: float) -> list[Row]:
    """What runs here."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if bench.device.type == "cuda":
        versions["cudnn"] = torch.backends.cudnn.version()
    for package in ("deepspeed", "lightning", "transformers"):
        versions[package] = _version(package)
    peak = peak_flops(bench.name, torch.bfloat16)
    return [
        {"what": "device", "is": bench.name},
        {"what": "peak in bf16, TFLOP/s, by its data sheet", "is": peak / 1e12 if peak else "not known: no MFU"},
        *({"what": name, "is": version or "not installed"} for name, version in versions.items()),
    ]


def checks(bench: Bench, deadline: float) -> list[Row]:
    """tests/gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command += ["--tb=short", "--show-capture=no", "-rfE"]
    if _version("pytest-xdist", "xdist"):  # most of their time goes into imports and compilation
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal", "-p", "no:benchmark"]
    try:
        done = subprocess.run(
            [*command, "tests/gpu"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=max(1.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError("tests/gpu took longer than this part may") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-60:]), file=sys.stderr)
        raise RuntimeError(f"tests/gpu: {lines[-1] if lines else done.stderr[-500:]}")
    return [{"what": "tests/gpu", "is": lines[-1]}]


def product(bench: Bench, deadline: float) -> list[Row]:
    """Two square matrices in bfloat16: what the tensor cores give outside of any model."""
    n = bench.sizes.product
    a, b = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for number in range(SETTLING + 20):
        bench.wait()
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        bench.wait()
        if number >= SETTLING:
            times.append(time.perf_counter() - began)
        if time.monotonic() > deadline and times:
            break
    bench.product = 2 * n**3 / statistics.median(times)
    peak = peak_flops(bench.name, torch.bfloat16)
    share = {"of the peak, %": 100 * bench.product / peak} if peak else {}
    return [{"matrices": f"{n} × {n}", "TFLOP/s, median of 20": bench.product / 1e12, **share}]


def gpt_1b(bench: Bench, deadline: float) -> list[Row]:
    batch = bench.sizes.gpt_1b_batch
    return [language_model(bench, "gpt 1B", bench.sizes.gpt_1b, batch, batch, {}, deadline)]


def gpt_8b(bench: Bench, deadline: float) -> list[Row]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(**bench.sizes.gpt_8b).parameters())
    needed = parameters * STATE_BYTES
    if needed > 0.9 * bench.memory:
        raise LeftOut(
            f"{needed / 2**30:.0f} GiB of weights, gradients, moments and copies, and the device has "
            f"{bench.memory / 2**30:.0f} GiB"
        )
    batch = bench.sizes.gpt_8b_batch
    return [language_model(bench, "gpt 8B", bench.sizes.gpt_8b, batch, batch, BF16_MOMENTS, deadline)]


def vit(bench: Bench, deadline: float) -> list[Row]:
    """Images from memory, so that no disk and no decoder is measured."""
    sizes = bench.sizes
    run = {
        "task": "classification",
        "model": {"name": sizes.vit, "args": {"num_classes": 1000}},
        "data": {"name": "given:Images", "eval": "none", "batch_size": sizes.images},
        "compile": sizes.compiled,
    }
    found = measure(bench, run, Subject(data=(Images(sizes.images * 2, sizes.side), None)), deadline)
    return [
        {
            "model": sizes.vit,
            "images a step": sizes.images,
            "side": sizes.side,
            "images/s": sizes.images / found.seconds,
            "ms a step": found.seconds * 1e3,
            "peak memory, GiB": found.peak_gib,
            "steps": found.steps,
        }
    ]


def peers(bench: Bench, deadline: float) -> list[Row]:
    """The same model, tokens, loss and fused AdamW with clipping; nothing is compiled. Each has its own bf16."""
    sizes = bench.sizes
    setting = Setting(bench.device, sizes.small, sizes.small_batch, SETTLING, sizes.steps)
    found = {name: train for name, (train, packages) in PEERS.items() if all(map(importlib.util.find_spec, packages))}
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(2):
        for name in list(found) if number % 2 == 0 else reversed(found):
            if time.monotonic() < deadline:
                bench.forget()
                times[name].append(seconds_a_step(found[name], setting))
    base = statistics.median(times["by hand"] or [math.nan])
    rows = [_peer_row(name, turns, base, setting) for name, turns in times.items()]
    return rows + [{"with": name, "tokens/s": "not installed"} for name in PEERS.keys() - found.keys()]


def _peer_row(name: str, turns: list[float], base: float, setting: Setting) -> Row:
    if not turns:
        return {"with": name, "tokens/s": "no time left"}
    middle = statistics.median(turns)
    return {
        "with": name,
        "tokens/s": setting.batch * setting.args["context"] / middle,
        "ms a step": middle * 1e3,
        "lowest": min(turns) * 1e3,
        "highest": max(turns) * 1e3,
        "of the time by hand": middle / base,
    }


class LeftOut(Exception):  # noqa: N818 # nothing is wrong
    """Why a part cannot run here."""


# ---- trainings ----------


@dataclass(frozen=True)
class Measured:
    """A training.

    Attributes:
        seconds: Of one step, the mean.
        steps: How many it is the mean of.
        peak_gib: Of the device's memory.
    """

    seconds: float
    steps: int
    peak_gib: float | None


def measure(bench: Bench, run: Mapping[str, Any], subject: Subject, deadline: float) -> Measured:
    """Steps of bigtrain's own loop, in bf16 under the single engine."""
    bench.forget()
    common = {
        "precision": "bf16",
        "train": {"steps": 100_000},
        "track": {"log_every": 100_000, "progress": "none"},
        "engine": {"name": "single", "device": bench.device.type},
    }
    with join(bench.device.type) as world, closing(assemble(from_dict({**common, **run}).config, world, subject)) as t:
        loop = t.loop()
        for number in range(SETTLING):
            if number < 2 or time.monotonic() < deadline - bench.sizes.measured_s:
                loop._one_step()
        bench.wait()
        began, steps = time.perf_counter(), 0
        while steps < bench.sizes.steps and (steps == 0 or time.monotonic() < deadline):
            loop._one_step()
            steps += 1
        bench.wait()
        return Measured((time.perf_counter() - began) / steps, steps, bench.peak_gib())


def language_model(
    bench: Bench, name: str, args: Mapping[str, Any], batch: int, micro: int, optim: Mapping[str, Any], deadline: float
) -> Row:
    """A gpt on made-up tokens, in microbatches as large as asked for, or as fit."""
    while True:
        found = _try_gpt(bench, args, batch, micro, optim, deadline)
        if found is not None:
            break
        if micro == 1:
            raise LeftOut("one sequence does not fit")
        micro //= 2
    with torch.device("meta"):
        model = GPT(**args)
    samples = batch / found.seconds
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "context": args["context"],
        "sequences a step": batch,
        "in microbatches of": micro,
        "compile": bench.sizes.compiled,
        "moments": optim.get("moments", "fp32"),
        "tokens/s": samples * args["context"],
        "ms a step": found.seconds * 1e3,
        **_shares(bench, model, samples),
        "peak memory, GiB": found.peak_gib,
        "steps": found.steps,
    }


def _try_gpt(
    bench: Bench, args: Mapping[str, Any], batch: int, micro: int, optim: Mapping[str, Any], deadline: float
) -> Measured | None:
    """None where memory runs out."""
    tokens = {"kind": "causal_lm", "samples": 4096, "context": args["context"], "vocab": args["vocab"]}
    run = {
        "task": "causal_lm",
        "model": "given:gpt",
        "data": {"name": "synthetic", "args": tokens, "eval": "none", "batch_size": batch},
        "train": {"steps": 100_000, "micro_batch_size": micro},
        "optim": {"lr": 1e-4, **optim},
        "compile": bench.sizes.compiled,
    }
    try:
        return measure(bench, run, Subject(model=lambda: gpt_on(bench.device, args)), deadline)
    except torch.OutOfMemoryError:
        return None


def _shares(bench: Bench, model: GPT, samples_per_s: float) -> Row:
    """Of the peak by the data sheet, counted in both ways, and of the measured product."""
    causal, full = (model.flops_per_sample(full_square=square) * samples_per_s for square in (False, True))
    peak = peak_flops(bench.name, torch.bfloat16)
    return {
        "MFU, causal, %": 100 * causal / peak if peak else None,
        "MFU, full square, %": 100 * full / peak if peak else None,
        "of the product, causal, %": 100 * causal / bench.product if bench.product else None,
    }


class Images:
    """Random images and labels in memory."""

    def __init__(self, number: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(number, 3, side, side, generator=generator)
        self.labels = torch.randint(1000, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        where = torch.tensor(indices)
        return self.images[where], self.labels[where]


# Each part, and the most seconds of eight minutes that it may take.
PARTS: dict[str, tuple[Callable[[Bench, float], list[Row]], float]] = {
    "environment": (environment, 5),
    "checks": (checks, 180),
    "product": (product, 10),
    "gpt_1b": (gpt_1b, 60),
    "gpt_8b": (gpt_8b, 90),
    "vit": (vit, 60),
    "peers": (peers, 80),
}


# ---- output ----------


def _version(package: str, module: str | None = None) -> str | None:
    if importlib.util.find_spec(module or package) is None:
        return None
    return importlib.metadata.version(package)


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: list[Row]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(shown(row.get(name)) for name in names)} |" for row in rows])


def run_part(bench: Bench, name: str, end: float, scale: float) -> Row:
    """One part, whatever happens in it."""
    function, seconds = PARTS[name]
    began = time.monotonic()
    left = end - began
    if left < min(seconds * scale, 30) * 0.5:
        return {"left out": f"{max(left, 0):.0f} s are left"}
    try:
        return {"rows": function(bench, min(end, began + seconds * scale)), "seconds": time.monotonic() - began}
    except LeftOut as reason:
        return {"left out": str(reason)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=8.0, help="how long all of it may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, whose numbers mean nothing")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny --device cpu shows that the program runs")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.init()  # or its memory could not be asked for before something is there
    bench = Bench(device, TINY if arguments.tiny else Sizes())
    end = time.monotonic() + arguments.minutes * 60
    wanted = [name for name in arguments.only.split(",") if name] or list(PARTS)
    results: dict[str, Row] = {}
    for name in wanted:
        results[name] = result = run_part(bench, name, end, arguments.minutes / 8)
        print(f"\n## {name}\n", flush=True)
        print(table(result["rows"]) if "rows" in result else str(result), flush=True)
        bench.forget()
    if arguments.json:
        arguments.json.write_text(json.dumps({"tiny": arguments.tiny, "parts": results}, indent=1) + "\n")
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
