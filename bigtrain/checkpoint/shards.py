"""The layout of a shard file: the safetensors format, with the place of every box in its name and hashes in its header.

    8 bytes      the length of the header, little endian
    header       JSON, padded with spaces to whole pages; for every box an entry
                 "weight:layers.0.up.weight[0:9/17,0:8/8]": {"dtype": "F32", "shape": [9, 8], "data_offsets": [0, 288]}
                 (kind, name, and by dimension where the box starts and stops in a tensor of how many), and
                 "__metadata__": {"bigtrain": "1", "chunk_bytes": …, "xxh3_128": …, "rank": …}
    data         the boxes, row-major, without gaps

Every box is hashed by itself, in chunks of `CHUNK` bytes (the last one shorter), so that a small tensor can be read
and verified alone and a large one from the middle. The hashes stand one after the other in `xxh3_128`, 32 digits a
chunk, in the order of the data. 1 MiB is large enough for the hash to run at its full speed, and small enough that
reading to the borders of chunks costs a resharding load little; a shard of 100 GiB has 3 MiB of hashes.

The header fills whole pages, and boxes come in the order of the largest power of two that divides their length: so
each element is aligned, and what fills pages lies in pages: out of other places the system copies up to a seventh more
slowly. The header is written after the data, in the place kept for it: the hashes are not known before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from bigtrain.checkpoint.json_exact import plain
from bigtrain.checkpoint.layout import Key, Part
from bigtrain.state import Box

CHUNK = 1 << 20
PAGE = 1 << 12  # the smallest of any machine
LARGEST_HEADER = 32 << 20  # the safetensors library reads up to 100 MB
LARGEST_TENSOR = 1 << 62  # elements or bytes
MOST_DIMENSIONS = 64

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {word: dtype for dtype, word in DTYPES.items()}

_NAME = re.compile(r"([^:]+):(.*)\[((?:\d{1,19}:\d{1,19}/\d{1,19}(?:,\d{1,19}:\d{1,19}/\d{1,19})*)?)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """One box in a shard file.

    Attributes:
        key: Kind and name of the tensor.
        shape: The full tensor's shape.
        dtype: Its dtype, in the words of safetensors.
        box: Which part this is.
        begin: Its first byte, from the beginning of the data.
        first_chunk: The number of its first chunk in the file.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: str
    box: Box
    begin: int
    first_chunk: int

    @property
    def num_bytes(self) -> int:
        """How long it is."""
        return math.prod(self.box.size) * item_bytes(self.dtype)

    @property
    def num_chunks(self) -> int:
        """How many hashes it has."""
        return -(-self.num_bytes // CHUNK)

    @property
    def title(self) -> str:
        """Its name in the file."""
        kind, name = self.key
        parts = zip(self.box.offset, self.box.size, self.shape, strict=True)
        return f"{kind}:{name}[{','.join(f'{o}:{o + n}/{full}' for o, n, full in parts)}]"


@dataclass(frozen=True, slots=True)
class Header:
    """What stands at the beginning of a shard file.

    Attributes:
        entries: The boxes in the order of the data.
        rank: JSON that the rank which wrote the file added for itself.
    """

    entries: tuple[Entry, ...]
    rank: str

    @property
    def data_bytes(self) -> int:
        """How long the data are."""
        return self.entries[-1].begin + self.entries[-1].num_bytes if self.entries else 0

    @property
    def num_chunks(self) -> int:
        """How many hashes there are."""
        return self.entries[-1].first_chunk + self.entries[-1].num_chunks if self.entries else 0

    def encode(self, hashes: Sequence[bytes] = ()) -> bytes:
        """The header with its length; as long without hashes as with them."""
        digits = b"".join(hashes).hex() or "0" * (32 * self.num_chunks)
        metadata = {"bigtrain": "1", "chunk_bytes": str(CHUNK), "xxh3_128": digits, "rank": self.rank}
        content: dict[str, Any] = {"__metadata__": metadata}
        for entry in self.entries:
            offsets = [entry.begin, entry.begin + entry.num_bytes]
            content[entry.title] = {"dtype": entry.dtype, "shape": list(entry.box.size), "data_offsets": offsets}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text

    def parts(self) -> dict[Key, Part]:
        """What the file holds, by tensor."""
        found: dict[Key, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.key, []).append(entry)
        return {
            key: Part(held[0].shape, held[0].dtype, tuple(sorted(entry.box for entry in held)))
            for key, held in found.items()
        }


def item_bytes(dtype: str) -> int:
    """The size of one element."""
    return TORCH_DTYPES[dtype].itemsize


def lay_out(boxes: Iterable[tuple[Key, tuple[int, ...], str, Box]], rank: str) -> Header:
    """Put boxes one after the other, in the order in which they are given."""
    entries = []
    begin = chunk = 0
    for key, shape, dtype, box in boxes:
        entries.append(Entry(key, shape, dtype, box, begin, chunk))
        begin += entries[-1].num_bytes
        chunk += entries[-1].num_chunks
    return Header(tuple(entries), rank)


def decode(raw: bytes, data_bytes: int) -> tuple[Header, bytes]:
    """Read a header, trusting nothing in it.

    Args:
        raw: All of it, with its length in front.
        data_bytes: How much follows it in the file.

    Returns:
        The header, and the hashes of all chunks one after the other.

    Raises:
        ValueError: Saying what is wrong.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise ValueError("its header has another length")
    content = plain(raw[8:])
    if not isinstance(content, dict):
        raise ValueError("its header is not an object")
    metadata = content.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("bigtrain") != "1" or metadata.get("chunk_bytes") != str(CHUNK):
        raise ValueError("its header was not written by this version of bigtrain")
    described = sorted((_described(title, value) for title, value in content.items()), key=lambda found: found[4:])
    header = lay_out([found[:4] for found in described], _text(metadata, "rank"))
    for entry, found in zip(header.entries, described, strict=True):
        if (entry.begin, entry.begin + entry.num_bytes) != found[4]:
            raise ValueError(f"{entry.title} does not lie where it should")
    hashes = bytes.fromhex(_text(metadata, "xxh3_128"))
    if header.data_bytes != data_bytes or len(hashes) != 16 * header.num_chunks:
        raise ValueError("its header does not describe all of its data")
    return header, hashes


def _described(title: str, value: Any) -> tuple[Key, tuple[int, ...], str, Box, tuple[int, int]]:
    """One entry: tensor, shape, dtype, box, and where it says its bytes are."""
    found = _NAME.fullmatch(title)
    if not found or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{title[:200]!r} is no box of a tensor")
    dims = [tuple(map(int, re.split("[:/]", dim))) for dim in found[3].split(",") if dim]
    if len(dims) > MOST_DIMENSIONS:
        raise ValueError(f"{title[:200]!r} has {len(dims)} dimensions")
    offset, stop, shape = (tuple(dim[i] for dim in dims) for i in range(3))
    box = Box(offset, tuple(b - a for a, b in zip(offset, stop, strict=True)))
    if any(not a <= b <= full for a, b, full in dims) or math.prod(n for n in shape if n) > LARGEST_TENSOR:
        raise ValueError(f"{title[:200]!r} reaches out of its tensor")
    if list(box.size) != value["shape"] or not isinstance(value["dtype"], str) or value["dtype"] not in TORCH_DTYPES:
        raise ValueError(f"{title[:200]!r} has another shape, or an unknown dtype")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(place) is not int for place in offsets):
        raise ValueError(f"{title[:200]!r} does not say where it lies")
    return (found[1], found[2]), shape, value["dtype"], box, (offsets[0], offsets[1])


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise ValueError(f"its header has no {key}")
    return value


def hash_of(data: memoryview | bytes | bytearray) -> bytes:
    """The XXH3-128 of some bytes."""
    return xxhash.xxh3_128_digest(data)
