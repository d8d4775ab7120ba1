"""What planning costs with 10,240 ranks and 1,000 tensors, seen from one of them: no time and no memory to speak of."""

from __future__ import annotations

import math
import time

import pytest

from bigtrain.checkpoint.layout import Part, find_cuts, is_corner, strays
from bigtrain.checkpoint.manifest import Layout, Manifest, Shard, decode
from bigtrain.checkpoint.shards import lay_out
from bigtrain.state import Box, boxes_of_slice

RANKS, BLOCKS = 10_240, 250
SHAPES = {
    f"layers.{block}.{name}.weight": shape
    for block in range(BLOCKS)
    for name, shape in {
        "attention.q": (8192, 8192),
        "mlp.up": (28672, 8192),
        "norm": (8192,),
        "mlp.bias": (28672,),
    }.items()
}


def held_by(layout: str, rank: int) -> dict[tuple[str, str], Part]:
    parts = {}
    for name, shape in SHAPES.items():
        unit = math.prod(shape[1:]) if layout == "rows" else 1
        total = math.prod(shape)
        every = -(-total // unit // RANKS) * unit
        start, stop = min(rank * every, total), min((rank + 1) * every, total)
        boxes = tuple(box for box, _ in boxes_of_slice(shape, start, stop))
        if boxes:
            parts["weight", name] = Part(shape, "F32", boxes)
        if rank == 0:
            parts["step", name] = Part((), "F32", (Box((), ()),))
    return parts


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_planning_is_local_and_the_manifest_small(layout: str) -> None:
    corners = {rank: parts for rank in (0, 8191, 9557, 10239) if is_corner((parts := held_by(layout, rank)).values())}
    mine = held_by(layout, 5)
    started = time.process_time()
    header = lay_out([(key, part.shape, part.dtype, box) for key, part in mine.items() for box in part.boxes], "{}")
    header.encode()
    cuts = find_cuts(corners)
    assert strays(5, header.parts(), cuts) == set()
    layouts = {key: Layout(part.shape, part.dtype, cut) for key, (part, cut) in cuts.items()}
    shards = tuple(Shard(10**9, 10**6, bytes(16)) for _ in range(RANKS))
    raw = Manifest(100, layouts, (10**6, bytes(16)), shards).encode()
    manifest = decode(raw)
    opened = [len(found.holders(0, math.prod(found.shape) // 5120)) for found in manifest.tensors.values()]
    assert time.process_time() - started < 1.0
    assert len(manifest.tensors) == 8 * BLOCKS
    assert len(raw) < 2_000_000
    assert max(opened) <= 3  # half as many ranks need two or three files each
