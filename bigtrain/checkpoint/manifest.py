"""The manifest: what a checkpoint consists of. It is written last, and with it the checkpoint is there.

    {"xxh3_128": "…", "manifest": {
      "format": "bigtrain", "version": 1, "step": 100,
      "tensors": {"weight": {"layers.0.up.weight": {"dtype": "F32", "shape": [17, 8], "cut": [0, 72, 72]}, …}, …},
      "state": [bytes, "hash"],
      "shards": [[bytes, bytes of the header, "hash of the header"], …]}}

It grows with tensors + files. For every tensor it has shape, dtype and the rule by which it is cut over the writers
(layout.Cut; or `"writers": […]` for one that follows no rule), not the boxes: those stand in the headers of the
shards, whose hashes are here and hold the hashes of all data. So a reader opens the headers of those files alone
that hold something it needs: its own where the layout is the same, two or three where 10,240 ranks become some other
number of them, and all only where a single process reads everything anyway.

Shards have no names here: the name of a file follows from the writer's number, and no manifest can lead a reader
out of its folder. The hash in front is that of all bytes of the inner object, and the bytes around it are fixed, so
that no bit of the file can change unseen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigtrain.checkpoint.json_exact import plain
from bigtrain.checkpoint.layout import Cut, Key, run_of_box
from bigtrain.checkpoint.shards import LARGEST_HEADER, LARGEST_TENSOR, MOST_DIMENSIONS, TORCH_DTYPES, Entry, hash_of

MANIFEST, STATE = "manifest.json", "state.json"
LARGEST_MANIFEST = 256 << 20
VERSION = 1

_HEAD, _MIDDLE, _TAIL = b'{"xxh3_128":"', b'","manifest":', b"}\n"
_HASH = re.compile("[0-9a-f]{32}")


class Shard(NamedTuple):
    """What the manifest knows of a shard file.

    Attributes:
        num_bytes: Its length.
        header_bytes: The length of its header, with the eight bytes in front.
        header_hash: The XXH3-128 of those.
    """

    num_bytes: int
    header_bytes: int
    header_hash: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor, and where it lies.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, in the words of safetensors.
        cut: The rule by which it is cut.
        writers: Who holds a part of it, where it is cut by none.
    """

    shape: tuple[int, ...]
    dtype: str
    cut: Cut | None
    writers: tuple[int, ...] = ()

    def holders(self, start: int, stop: int) -> range | tuple[int, ...]:
        """Whose files have to be opened for the elements from `start` to before `stop` of the flattened tensor."""
        return self.cut.writers_of(start, stop) if self.cut else self.writers

    def has_place_for(self, writer: int, entry: Entry) -> bool:
        """Whether a box that a writer's file has is one that should be there."""
        if (entry.shape, entry.dtype) != (self.shape, self.dtype):
            return False
        if not self.cut:
            return writer in self.writers
        run = run_of_box(entry.shape, entry.box)
        start, stop = self.cut.run_of(writer, math.prod(self.shape))
        return run is not None and (run[0] == run[1] or start <= run[0] < run[1] <= stop)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: How many steps had been taken.
        tensors: Every tensor by kind and name.
        state: Length and hash of state.json.
        shards: The shard files by writer.
    """

    step: int
    tensors: Mapping[Key, Layout]
    state: tuple[int, bytes]
    shards: tuple[Shard, ...]

    def encode(self) -> bytes:
        """The bytes of the file."""
        tensors: dict[str, dict[str, Any]] = {}
        for (kind, name), layout in self.tensors.items():
            where = {"cut": list(layout.cut)} if layout.cut else {"writers": list(layout.writers)}
            tensors.setdefault(kind, {})[name] = {"dtype": layout.dtype, "shape": list(layout.shape), **where}
        content = {
            "format": "bigtrain",
            "version": VERSION,
            "step": self.step,
            "tensors": tensors,
            "state": [self.state[0], self.state[1].hex()],
            "shards": [[shard.num_bytes, shard.header_bytes, shard.header_hash.hex()] for shard in self.shards],
        }
        inner = json.dumps(content, separators=(",", ":")).encode()
        return _HEAD + hash_of(inner).hex().encode() + _MIDDLE + inner + _TAIL


def shard_name(writer: int) -> str:
    """The name of a writer's file."""
    return f"shard-{writer:05d}.safetensors"


def decode(raw: bytes) -> Manifest:
    """Read a manifest, trusting nothing in it.

    Raises:
        ValueError: Saying what is wrong.
    """
    start = len(_HEAD) + 32 + len(_MIDDLE)
    inner = raw[start : -len(_TAIL)]
    if _HEAD + hash_of(inner).hex().encode() + _MIDDLE + inner + _TAIL != raw:
        raise ValueError("its hash does not match")
    content = plain(inner)
    if not isinstance(content, dict) or content.get("format") != "bigtrain" or content.get("version") != VERSION:
        raise ValueError(f"it is not a manifest of version {VERSION}")
    shards = tuple(_shard(value) for value in _typed(content.get("shards"), list))
    kinds = _typed(content.get("tensors"), dict)
    tensors = {
        (kind, name): _layout(f"{kind} {name}", value, len(shards))
        for kind, named in kinds.items()
        for name, value in _typed(named, dict).items()
    }
    state = _typed(content.get("state"), list)
    if len(state) != 2:
        raise ValueError("it does not describe state.json")
    return Manifest(_count(content.get("step")), tensors, (_count(state[0]), _hash(state[1])), shards)


def _shard(value: Any) -> Shard:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("it does not describe its shards")
    shard = Shard(_count(value[0]), _count(value[1]), _hash(value[2]))
    if not 8 <= shard.header_bytes <= min(shard.num_bytes, LARGEST_HEADER):
        raise ValueError(f"a shard of {shard.num_bytes} bytes cannot have a header of {shard.header_bytes}")
    return shard


def _layout(title: str, value: Any, num_shards: int) -> Layout:
    found = _typed(value, dict)
    shape = tuple(_count(size) for size in _typed(found.get("shape"), list))
    if not isinstance(found.get("dtype"), str) or found["dtype"] not in TORCH_DTYPES:
        raise ValueError(f"{title} has the unknown dtype {found.get('dtype')!r}")
    if len(shape) > MOST_DIMENSIONS or math.prod(size for size in shape if size) > LARGEST_TENSOR:
        raise ValueError(f"{title} is impossibly large")
    numel = math.prod(shape)
    layout = Layout(shape, found["dtype"], None, tuple(_count(n) for n in _typed(found.get("writers", []), list)))
    if "cut" in found:
        numbers = [_count(number) for number in _typed(found["cut"], list)]
        if len(numbers) != 3 or numbers[2] == 0 or (numel and numbers[1] == 0):
            raise ValueError(f"{title} is cut by no rule")
        layout = Layout(shape, found["dtype"], Cut(*numbers))
    if list(layout.writers) != sorted(set(layout.writers)):
        raise ValueError(f"{title} lies in a shard twice")
    holders = layout.holders(0, numel)  # in order; of a cut into very many, a range that must not be walked through
    if len(holders[:1]) and holders[-1] >= num_shards:
        raise ValueError(f"{title} lies in shards that are not there")
    return layout


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has {type(value).__name__} where {kind.__name__} should be")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_TENSOR:
        raise ValueError(f"it has {str(value)[:50]!r} where a count should be")
    return value


def _hash(value: Any) -> bytes:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"it has {str(value)[:50]!r} where a hash should be")
    return bytes.fromhex(value)
