"""What loading a sharded Hugging Face folder takes in memory on each rank, beyond what the rank holds afterwards.

    python benchmarks/pretrained.py [--gb 2] [--engines fsdp,deepspeed:3,ddp]

A Llama of that size is written in files of half a gigabyte; two gloo ranks start from it. The most that a rank holds
(without pages of mapped files, which the system can drop) is looked at every two milliseconds, from before the model is
built until its weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from bigtrain import models  # noqa: E402
from bigtrain.config.loader import from_dict  # noqa: E402
from bigtrain.dist import join  # noqa: E402
from bigtrain.doors.names import llama_config, to_llama  # noqa: E402
from bigtrain.pretrained import start_from  # noqa: E402
from bigtrain.processes import run_ranks  # noqa: E402
from bigtrain.trainer import assemble  # noqa: E402

MIB, FILE_BYTES = 1 << 20, 1 << 29
DEFAULTS = {"kv_heads": 16, "tied": False, "dropout": 0.0, "rope_theta": 1e4, "norm_eps": 1e-5}


def model_args(gigabytes: float) -> dict[str, Any]:
    """A gpt of that many bytes in float32: layers of 50 MB, and two tables."""
    layers = round((gigabytes * 1e9 - 2 * 32000 * 1024 * 4) / 50.3e6)
    return {"vocab": 32000, "layers": layers, "width": 1024, "heads": 16, "mlp_width": 2728, "context": 64}


def write(folder: Path, args: dict[str, Any]) -> int:
    """Write the folder, tensor by tensor; how many bytes it has."""
    with torch.device("meta"):
        model = models.build("gpt", args)
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part.clear()

    for name, parameter in model.named_parameters():
        part[to_llama(name)] = torch.randn(parameter.shape) / 50
        total += parameter.numel() * 4
        if sum(tensor.nbytes for tensor in part.values()) > FILE_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(llama_config({**DEFAULTS, **args}, "float32")))
    return total


def anonymous() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def load(folder: str, args: dict[str, Any], engine: str) -> tuple[int, int, int, int, float]:
    """Bytes of the weights held, the most while building, all that is held then, what reading adds; and seconds."""
    name, _, stage = engine.partition(":")
    run = {
        "task": "causal_lm",
        "model": {"name": "gpt", "args": args},
        "data": {
            "name": "synthetic",
            "args": {"kind": "causal_lm", "samples": 4, "context": 64, "vocab": 32000},
            "batch_size": 2,
            "eval": "none",
        },
        "train": {"steps": 1},
        "engine": {"name": name, "device": "cpu", "deepspeed": {"stage": int(stage or 3)}},
        "finetune": {"init_from": folder},
    }
    with join("cpu", needs_group=True) as world:
        most, is_over = [0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.002):
                most[0] = max(most[0], anonymous())

        before, began = anonymous(), time.perf_counter()
        watcher = threading.Thread(target=watch)
        watcher.start()
        training = assemble(from_dict(run).config, world)
        building, built, most[0] = most[0], anonymous(), 0
        start_from(training)
        is_over.set()
        watcher.join()
        held = sum(piece.data.nbytes for piece in training.engine.state().pieces if piece.kind == "weight")
        seconds = time.perf_counter() - began
        training.close()
        return held, building - before, built - before, most[0] - built, seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--engines", default="fsdp,deepspeed:3,ddp")
    given = parser.parse_args()
    args = model_args(given.gb)
    with tempfile.TemporaryDirectory() as folder:
        total = write(Path(folder), args)
        print(f"torch {torch.__version__}, a folder of {total / 1e9:.2f} GB, 2 gloo ranks\n")
        titles = ("", "own weights, MiB", "most while built", "held when built", "reading adds", "seconds in all")
        print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        for engine in given.engines.split(","):
            for rank, (*sizes, seconds) in enumerate(run_ranks(load, 2, (folder, args, engine))):
                print(f"| {engine}, rank {rank} | {' | '.join(f'{n / MIB:.0f}' for n in sizes)} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
