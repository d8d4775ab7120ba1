"""Token loading, side by side: bigtrain's loader, a raw memory-map gather, and torch's DataLoader sample by sample.

    python benchmarks/token_loader.py [--tokens 64000000] [--rounds 15] [--folder DIR]

All three deliver windows of one file in random order as int64 tensors, in one process with one thread, in rounds of
A-B-C-C-B-A. Then it seeks to random places of 10^12 tokens, in a file that is one hole. What it writes is deleted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bigtrain.data import Position, TrainLoader, create
from bigtrain.data.token_files import FORMAT, Meta

SHAPES = [(8, 1024), (64, 1024), (64, 256), (256, 256)]  # batch size, context
TRILLION = 10**12
BATCHES = 200  # of each contender in a turn
SEED = 0

Batches = Callable[[int], float]
"""Delivers so many batches; returns the seconds that it took."""


def write_tokens(folder: Path, num_tokens: int, content: NDArray[np.uint16] | None) -> None:
    """A folder as `bigtrain data pack` writes it; without content, tokens.bin is one hole."""
    folder.mkdir()
    with (folder / "tokens.bin").open("wb") as file:
        if content is not None:
            content.tofile(file)
        file.truncate(num_tokens * 2)
    np.zeros(1, dtype="<u8").tofile(folder / "documents.bin")
    meta = Meta(FORMAT, "uint16", num_tokens, 1, 50_000, None, "none", "none", "none", "none")
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


class Windows(Dataset[dict[str, Tensor]]):
    """What one writes by hand: a window a sample, in the form of bigtrain's samples."""

    def __init__(self, tokens: NDArray[np.uint16], context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * self.context
        return {"tokens": torch.from_numpy(self.tokens[begin : begin + self.context + 1].astype(np.int64))}


def timed(batches: Iterator[Any]) -> Batches:
    """Keep the last batch while the next is made, as a training loop does."""

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            kept = next(batches)
        del kept
        return time.perf_counter() - begin

    return run


def raw_gather(tokens: NDArray[np.uint16], context: int, order: NDArray[np.int64]) -> Iterator[Tensor]:
    """One indexing of overlapping rows of the memory map for each batch, with indices that are ready in arrays."""
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context + 1)[::context]
    for indices in order:
        yield torch.from_numpy(rows[indices].astype(np.int64))


def sample_by_sample(tokens: NDArray[np.uint16], context: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """DataLoader of torch as it is mostly used, in this process."""
    loader = DataLoader(Windows(tokens, context), batch_size=batch_size, shuffle=True)
    while True:
        yield from loader


def compare(folder: Path, batch_size: int, context: int, rounds: int) -> list[str]:
    """One line of the table for each; each has its own order, so that none finds the others' windows in a cache."""
    dataset = create("tokens", "train", {"path": str(folder), "context": context})
    tokens: NDArray[np.uint16] = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(SEED).integers(len(dataset), size=(2 * (rounds + 1) * BATCHES, batch_size))
    contenders = {
        "raw memory-map gather": timed(raw_gather(tokens, context, order)),
        "bigtrain TrainLoader": timed(TrainLoader(dataset, batch_size=batch_size, seed=SEED).steps()),
        "DataLoader, sample by sample": timed(sample_by_sample(tokens, context, batch_size)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in [*contenders, *reversed(contenders)]:
            taken = contenders[name](BATCHES) / BATCHES
            if number:  # the first round warms up
                seconds[name].append(taken)
    return list(lines(seconds, batch_size, context))


def lines(seconds: dict[str, list[float]], batch_size: int, context: int) -> Iterator[str]:
    """Rows of the table: medians, quartiles, and the rate against the raw gather's."""
    raw = statistics.median(seconds["raw memory-map gather"])
    for name, values in seconds.items():
        low, median, high = (value * 1e6 for value in statistics.quantiles(values, n=4))
        rate = batch_size * context / statistics.median(values) / 1e6
        relative = raw / statistics.median(values)
        timing = f"{median:.1f} ({low:.1f} – {high:.1f})"
        yield f"| {batch_size} × {context} | {name} | {timing} | {rate:.0f} | {relative:.2f} |"


def seek(folder: Path, rounds: int) -> list[str]:
    """Lines for the time until the first batch from a random place of 10^12 tokens."""
    args = {"path": str(folder), "context": 1024}
    loader = TrainLoader(create("tokens", "train", args), batch_size=64, seed=SEED)
    places = np.random.default_rng(0).integers(loader.num_samples, size=8 * rounds).tolist()
    opened, unopened = [], []
    for epoch, place in enumerate(places):
        begin = time.perf_counter()
        if epoch % 2:
            next(loader.steps(Position(epoch, place)))
            opened.append(time.perf_counter() - begin)
        else:
            dataset = create("tokens", "train", args)
            next(TrainLoader(dataset, batch_size=64, seed=SEED).steps(Position(epoch, place)))
            unopened.append(time.perf_counter() - begin)
    return [
        f"| {name} | {statistics.median(values) * 1e3:.2f} | {max(values) * 1e3:.2f} |"
        for name, values in [("in an open dataset", opened), ("opening it included", unopened)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        content = np.random.default_rng(0).integers(0, 50_000, options.tokens, dtype=np.uint16)
        write_tokens(Path(name) / "real", options.tokens, content)
        print("| batch × context | loader | µs a batch: median (quartiles) | million tokens/s | against raw |")
        print("|---|---|---|---|---|")
        for batch_size, context in SHAPES:
            print("\n".join(compare(Path(name) / "real", batch_size, context, options.rounds)), flush=True)
        write_tokens(Path(name) / "trillion", TRILLION, None)
        print("\n| first batch from a random place of 10^12 tokens | median, ms | worst, ms |\n|---|---|---|")
        print("\n".join(seek(Path(name) / "trillion", options.rounds)))


if __name__ == "__main__":
    main()
