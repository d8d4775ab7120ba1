"""Read a bigtrain checkpoint with Python and numpy alone: the format is yours.

    python read_checkpoint.py runs/quickstart/checkpoints/step-00000100            lists the tensors
    python read_checkpoint.py runs/quickstart/checkpoints/step-00000100 out.npz    writes the weights

A checkpoint is a folder: manifest.json (shapes, lengths), state.json (hyperparameters and what else was kept) and one
shard file a writer, each a safetensors file. The name of a tensor in a shard says which box of it is there:
`weight:layers.0.up.weight[0:9/17,0:8/8]` is rows 0 to 9 of 17, columns 0 to 8 of 8. This reader checks lengths, and
hashes too where the xxhash package is installed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?", "BF16": "<u2",
}  # fmt: skip
ENTRY = re.compile(r"(?P<kind>[^:]+):(?P<name>.*)\[(?P<box>[^\]]*)\]", re.DOTALL)


def read_manifest(folder: Path) -> dict:
    """What the checkpoint consists of; it is written last, so without it there is no checkpoint."""
    raw = (folder / "manifest.json").read_bytes()
    manifest = json.loads(raw)["manifest"]
    inner = raw[raw.index(b'"manifest":') + len(b'"manifest":') : raw.rindex(b"}")]
    check(inner, json.loads(raw)["xxh3_128"], "manifest.json")
    return manifest


def read_tensors(folder: Path, kind: str = "weight") -> dict[str, np.ndarray]:
    """Every tensor of a kind, put together from all shards: weight, buffer, exp_avg, exp_avg_sq, step."""
    manifest = read_manifest(folder)
    tensors = {
        name: np.empty(spec["shape"], DTYPES[spec["dtype"]]) for name, spec in manifest["tensors"].get(kind, {}).items()
    }
    for number, (length, header_length, header_hash) in enumerate(manifest["shards"]):
        path = folder / f"shard-{number:05d}.safetensors"
        if path.stat().st_size != length:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {length}")
        for name, box, data in read_boxes(path, header_length, header_hash, kind):
            tensors[name][box] = data
    # bfloat16 is the upper half of a float32.
    bf16 = [name for name, spec in manifest["tensors"].get(kind, {}).items() if spec["dtype"] == "BF16"]
    for name in bf16:
        tensors[name] = (tensors[name].astype("<u4") << 16).view("<f4")
    return tensors


def read_boxes(path: Path, header_length: int, header_hash: str, kind: str) -> Iterator[tuple]:
    """The boxes of a kind that one shard holds: the tensor's name, where the box lies in it, its elements."""
    with path.open("rb") as file:
        raw = file.read(header_length)
        check(raw, header_hash, str(path))
        header = json.loads(raw[8:])
        about = header.pop("__metadata__")
        chunk_bytes, hashes = int(about["chunk_bytes"]), about["xxh3_128"]
        for entry, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = spec["data_offsets"]
            file.seek(header_length + start)
            data = file.read(stop - start)
            for at in range(0, len(data), chunk_bytes):  # each box is hashed by itself, in chunks
                check(data[at : at + chunk_bytes], hashes[:32], f"{path}: {entry}")
                hashes = hashes[32:]
            found = ENTRY.fullmatch(entry)
            if found["kind"] == kind:
                parts = [part.partition("/")[0].split(":") for part in found["box"].split(",") if part]
                box = tuple(slice(int(begin), int(end)) for begin, end in parts)
                yield found["name"], box, np.frombuffer(data, DTYPES[spec["dtype"]]).reshape(spec["shape"])


def check(data: bytes, expected: str, what: str) -> None:
    """Compare with the XXH3-128 that was written, where the package is there."""
    try:
        import xxhash
    except ImportError:
        return
    if xxhash.xxh3_128_hexdigest(data) != expected:
        raise ValueError(f"{what} is not what was written")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    weights = read_tensors(Path(sys.argv[1]))
    for name, tensor in sorted(weights.items()):
        print(f"{name}  {'×'.join(map(str, tensor.shape)) or 'scalar'}  {tensor.dtype}")
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], **weights)
