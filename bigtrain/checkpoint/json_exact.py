"""JSON that gives back exactly what it was given: tuples, bytes, and floats that are not finite among the rest.

Plain JSON turns tuples into lists, knows no bytes, and has no word for nan. These are written as an object with one
key that begins with `$`; everything else is JSON as it stands.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

_TUPLE, _BYTES, _FLOAT = "$tuple", "$bytes", "$float"


def dumps(value: Any, *, what: str) -> str:
    """The value as JSON.

    Args:
        value: None, bool, int, float, str, bytes, and lists, tuples and mappings of these.
        what: Its name in errors.

    Raises:
        TypeError: Naming the place of anything else.
    """
    return json.dumps(_encoded(value, what), allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """What `dumps` was given.

    Raises:
        ValueError: Where the text is not what `dumps` writes.
    """
    try:
        return _decoded(json.loads(text, object_pairs_hook=without_doubles, parse_constant=_refuse_constant))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain(text: str | bytes) -> Any:
    """Standard JSON, without doubled keys.

    Raises:
        ValueError: Where it is not.
    """
    try:
        return json.loads(text, object_pairs_hook=without_doubles, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, refused where a key comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _encoded(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, bytes | bytearray):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, where): _encoded(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is of type {type(value).__name__}, which cannot be kept in a checkpoint")


def _key(key: Any, where: str) -> str:
    if type(key) is str and not key.startswith("$"):
        return key
    raise TypeError(f"{where} has the key {key!r}; a key must be text that does not begin with $")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    word = next(iter(value), "")
    if not word.startswith("$"):
        return {key: _decoded(item) for key, item in value.items()}
    held = value[word]
    if len(value) == 1 and word == _TUPLE and isinstance(held, list):
        return tuple(_decoded(item) for item in held)
    if len(value) == 1 and word == _FLOAT and held in ("nan", "inf", "-inf"):
        return float(held)
    if len(value) == 1 and word == _BYTES and isinstance(held, str):
        try:
            return base64.b64decode(held, validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
    raise ValueError(f"{word} is not used as it should be")
