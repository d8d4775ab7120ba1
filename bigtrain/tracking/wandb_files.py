"""What wandb leaves on this machine: its login, and the files from which an offline run is sent later.

A .wandb file is a log in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) after seven
bytes of its own, of records that wandb's protocol describes. A record that was cut off by a kill ends it.
"""

from __future__ import annotations

import netrc
import os
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_BLOCK, _HEADER, _MAGIC = 32768, 7, b":W&B"
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def is_online(mode: str) -> bool:
    """Whether to talk to W&B's server: as was asked for, or where a login exists."""
    wanted = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    if wanted in ("online", "offline"):
        return wanted == "online"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _saved_url()).hostname or ""
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def _saved_url() -> str:
    """The server that wandb's own settings name."""
    import wandb

    return str(wandb.setup().settings.base_url)


def logs(run_folder: Path, run_id: str) -> list[Path]:
    """The .wandb files of a run in its folder, the oldest first."""
    # wandb names folders by the second, and adds a number where there is one of this second.
    return sorted((run_folder / "wandb").glob(f"*run-*-{run_id}*/run-{run_id}.wandb"))


def how_to_send(run_folder: Path) -> str | None:
    """How the files of a run are sent later, in a line; None where there are none."""
    with suppress(OSError):
        run_id = (run_folder / "wandb_id").read_text(encoding="utf-8").strip()
        if logs(run_folder, run_id):
            shown = shlex.quote(os.path.relpath(run_folder / "wandb"))
            return f"W&B has its files here; to send them: wandb sync {shown}/*run-*-{run_id}*"
    return None


def mark_sent(run_folder: Path, run_id: str) -> None:
    """Tell `wandb sync` that what offline starts left need not be sent: an online start has sent it."""
    for path in logs(run_folder, run_id):
        if path.parent.name.startswith("offline-"):
            path.with_name(path.name + ".synced").touch()


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, until its end or where it was cut off.

    Raises:
        ValueError: Where it is something else.
    """
    data = path.read_bytes()
    if data and not data.startswith(_MAGIC):
        raise ValueError(f"{path.name} is no file of wandb's")
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if len(body) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            yield parts


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .wandb file, values as their JSON."""
    from wandb.proto import wandb_internal_pb2 as protocol

    for body in records(path):
        record = protocol.Record.FromString(body)  # type: ignore[attr-defined] # made when it is imported
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def last_values(paths: Iterable[Path], first: str, second: str) -> tuple[int, int]:
    """The largest value of each of two keys in several .wandb files; 0 where there is none."""
    largest = {first: 0, second: 0}
    for path in paths:
        for row in history(path):
            for key in largest.keys() & row.keys():
                largest[key] = max(largest[key], int(float(row[key])))
    return largest[first], largest[second]


def flat_config(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A run file's values by dotted key, as W&B's table of configs compares them."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat_config(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
