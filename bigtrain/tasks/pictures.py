"""Small pictures as text, for pages that hold everything they show."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

_LARGEST = 256  # pixels of a side


def is_picture(image: Tensor) -> bool:
    """Whether a tensor can be shown: (C, H, W) with one or three channels, and not too large."""
    return image.ndim == 3 and image.shape[0] in (1, 3) and max(image.shape[1:]) <= _LARGEST


def data_uri(image: Tensor) -> str:
    """A picture (C, H, W) on the host, stretched to its own darkest and brightest, as a data: URI of a PNG."""
    values = image.detach().float()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp_min(1e-12) * 255
    rows = scaled.round().byte().permute(1, 2, 0).reshape(image.shape[1], -1)  # (H, W * C)
    return "data:image/png;base64," + base64.b64encode(_png(rows, channels=image.shape[0])).decode()


def _png(rows: Tensor, *, channels: int) -> bytes:
    """Rows of bytes (H, W * C) as a PNG (https://www.w3.org/TR/png-3): every row without a filter."""
    height, width = rows.shape[0], rows.shape[1] // channels
    kind = 0 if channels == 1 else 2
    lines = b"".join(b"\0" + bytes(row) for row in rows.tolist())
    header = struct.pack(">2I5B", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
