"""What loading a sharded Hugging Face folder takes in memory on each rank, beyond what the rank holds afterwards.

    python benchmarks/pretrained.py [--gb 2] [--engines fsdp,deepspeed:3,ddp] [--no-step]

A Llama of that size is written in files of half a gigabyte; two gloo ranks start from it. The most that a rank holds
(without pages of mapped files, which the system can drop) is looked at every two milliseconds, from before the model is
built until its weights are read, and in one step of training after that. The bare library does the same with the same
model and torch's AdamW, as its documentation says, but for the reading: it begins with initial values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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
from torch.distributed.fsdp import fully_shard  # noqa: E402

from bigtrain import models  # noqa: E402
from bigtrain.config.loader import from_dict  # noqa: E402
from bigtrain.dist import join  # noqa: E402
from bigtrain.doors.names import llama_config, to_llama  # noqa: E402
from bigtrain.pretrained import start_from  # noqa: E402
from bigtrain.processes import run_ranks  # noqa: E402
from bigtrain.trainer import assemble  # noqa: E402

# Own weights, the most while built, what is held then, what reading adds, the most in a step, what is held after it.
Row = tuple[int, int, int, int, int, int, float]
TITLES = (
    "",
    "own weights",
    "most while built",
    "held when built",
    "reading adds",
    "most in a step",
    "held after the step",
    "seconds to build and read",
)
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


class Watch:
    """The most that this process holds, and what it holds, beyond what it held at first."""

    def __init__(self) -> None:
        self._most, self._first, self._is_over = 0, anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self.began = time.perf_counter()

    def _look(self) -> None:
        while not self._is_over.wait(0.002):
            self._most = max(self._most, anonymous())

    def take(self) -> tuple[int, int]:
        """The most since the last call, and what is held now."""
        now = anonymous()
        most, self._most = max(self._most, now), 0
        return most - self._first, now - self._first

    def end(self) -> None:
        """Look no more."""
        self._is_over.set()
        self._thread.join()


def load(folder: str, args: dict[str, Any], engine: str, takes_step: bool) -> Row:
    """bigtrain: build, read the folder, take a step."""
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
        watch = Watch()
        training = assemble(from_dict(run).config, world)
        building, built = watch.take()
        start_from(training)
        reading = watch.take()[0] - built
        seconds = time.perf_counter() - watch.began
        for batch in next(training.train.steps()).microbatches if takes_step else ():
            with training.engine.microbatch(last=True):
                training.engine.backward(training.task.loss(training.engine.model, training.move(batch)))
            training.engine.step(1.0)
        stepping, stepped = watch.take()
        watch.end()
        held = sum(piece.data.nbytes for piece in training.engine.state().pieces if piece.kind == "weight")
        training.close()
    return held, building, built, reading, stepping, stepped, seconds


def by_hand(folder: str, args: dict[str, Any], engine: str, takes_step: bool) -> Row:
    """The bare library: build, take a step."""
    torch.manual_seed(0)
    tokens = torch.randint(32000, (1, 64))
    watch = Watch()
    model, optimizer, held = BARE[engine](args)
    building, built = watch.take()
    seconds = time.perf_counter() - watch.began
    if takes_step:
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    stepping, stepped = watch.take()
    watch.end()
    return held, building, built, 0, stepping, stepped, seconds


def _ddp(args: dict[str, Any]) -> tuple[Any, Any, int]:
    model = models.build("gpt", args)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return wrapped, torch.optim.AdamW(wrapped.parameters()), sum(p.nbytes for p in model.parameters())


def _fsdp(args: dict[str, Any]) -> tuple[Any, Any, int]:
    with torch.device("meta"):
        model: Any = models.build("gpt", args)
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    model.reset_buffers()
    held = sum(p.to_local().nbytes for p in model.parameters())
    return model, torch.optim.AdamW(model.parameters()), held


def _zero_3(args: dict[str, Any]) -> tuple[Any, Any, int]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = models.build("gpt", args)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, None, sum(p.ds_tensor.nbytes for p in model.parameters())


BARE = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed:3": _zero_3}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--engines", default="fsdp,deepspeed:3,ddp")
    parser.add_argument("--no-step", action="store_true", help="a step needs several times the memory")
    given = parser.parse_args()
    args = model_args(given.gb)
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        total = write(Path(folder), args)
        print(f"torch {torch.__version__}, {total / 1e9:.2f} GB, 2 gloo ranks, in MiB of the rank with most\n")
        titles = [title for title in TITLES if not (given.no_step and "step" in title)]
        print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        for engine, (who, function) in itertools.product(
            given.engines.split(","), (("the bare library", by_hand), ("bigtrain", load))
        ):
            if function is by_hand and engine not in BARE:
                continue
            rows = run_ranks(function, 2, (folder, args, engine, not given.no_step))
            *sizes, seconds = (max(column) for column in zip(*rows, strict=True))
            cells = [f"{n / MIB:,.0f}" for n in sizes[: -2 if given.no_step else None]]
            print(f"| {engine}, {who} | {' | '.join([*cells, f'{seconds:.1f}'])} |", flush=True)


if __name__ == "__main__":
    main()
