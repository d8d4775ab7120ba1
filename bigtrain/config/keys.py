"""What can be asked about the schema: which keys there are, what they take, how far they are built.

A path is the parts of a dotted key. Positions in lists are parts, too, and stand for any item.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic.fields import FieldInfo

from bigtrain.catalogue import DATA, MODELS, OPTIMIZERS, TASKS
from bigtrain.config.fields import OneOrMany, Section
from bigtrain.config.help import help_of
from bigtrain.config.schema import Config

Path: TypeAlias = tuple[str | int, ...]

BASE = "base"
BASE_HELP = "Another run file, relative to this one, whose values hold where this file gives none."


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the run file.

    Attributes:
        path: The dotted key; `[]` stands for any item of a list.
        kind: What it takes, in a line.
        default: Its default in YAML; None where it has to be given, or is a section.
        help: Its sentence of help.
        is_section: Whether it holds keys and nothing else.
    """

    path: str
    kind: str
    default: str | None
    help: str
    is_section: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def __str__(self) -> str:
        if self.is_section:
            return f"{self.path}: {self.help}"
        return f"{self.path} ({'required' if self.default is None else f'default {self.default}'}): {self.help}"


def show(value: object, width: int = 60) -> str:
    """A value in YAML, on one line and not too long."""
    if isinstance(value, str) and value.isidentifier() and value not in ("true", "false", "null"):
        return value
    if isinstance(value, Section):
        value = value.model_dump()
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= width else text[: width - 1] + "…"


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field of this annotation may hold, directly or as items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for arg in get_args(annotation) for section in sections_in(arg)]


def sections_at(path: Path) -> list[type[Section]]:
    """The sections that may stand at a path; several where a key takes one of several shapes."""
    sections: list[type[Section]] = [Config]
    for part in path:
        if is_position(part):
            continue
        fields = [section.model_fields.get(str(part)) for section in sections]
        sections = [s for field in fields if field for s in sections_in(field.annotation)]
    return sections


def is_position(part: str | int) -> bool:
    """Whether a part of a path counts the items of a list."""
    return isinstance(part, int) or (part.isdecimal() and len(part) < 10)


def field_at(path: Path) -> FieldInfo | None:
    """The field at a path; for an item of a list, that of the list."""
    while path and is_position(path[-1]):
        path = path[:-1]
    if not path:
        return None
    fields = [section.model_fields.get(str(path[-1])) for section in sections_at(path[:-1])]
    return next((field for field in fields if field), None)


@cache
def keys_at(path: Path) -> tuple[Key, ...]:
    """The keys that a section at this path takes."""
    prefix = ".".join(map(str, path))
    found: dict[str, Key] = {}
    for section in sections_at(path):
        for name in section.model_fields:
            found.setdefault(name, _key(f"{prefix}.{name}" if prefix else name, section, name))
    if not path:
        found[BASE] = Key(BASE, "text", "null", BASE_HELP)
    return tuple(found.values())


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key of the run file, in its order."""
    return (Key(BASE, "text", "null", BASE_HELP), *_walk((Config,), ""))


def words_of(path: str) -> list[str]:
    """The words that a key may be: those of its kind, and the names of what there is."""
    kinds = [part for key in all_keys() if key.path == path for part in key.kind.split(" | ")]
    words = [part for part in kinds if part.isidentifier() and part not in _KINDS]
    return [*words, *_NAMED.get(path, ())]


def _walk(sections: Sequence[type[Section]], prefix: str) -> Iterator[Key]:
    for section in sections:
        for name, field in section.model_fields.items():
            yield _key(prefix + name, section, name)
            inside = sections_in(field.annotation)
            is_list = any(get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation)))
            yield from _walk(inside, f"{prefix}{name}{'[]' if is_list else ''}.")


def _key(path: str, section: type[Section], name: str) -> Key:
    field = section.model_fields[name]
    default = field.get_default(call_default_factory=True)
    is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    return Key(
        path,
        kind_of(field.annotation, field.metadata),
        None if is_section or field.is_required() else show(default, width=1000),
        help_of(section, name),
        is_section,
    )


_KINDS = ("int", "number", "text", "name", "mapping", "metric")  # what a word stands for, and is not
_NAMED = {
    "task": TASKS,
    "model": MODELS,
    "optim": OPTIMIZERS,
    "task.name": TASKS,
    "model.name": MODELS,
    "optim.name": OPTIMIZERS,
    "data.name": DATA,
}
_WORDS = {bool: "true | false", int: "int", float: "number", str: "text", type(None): "null"}


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a key takes, in one line: `auto | int > 0`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return kind_of(args[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        return " | ".join(show(value) for value in args)
    if origin is tuple:
        alone = "text | " if any(isinstance(mark, OneOrMany) for mark in metadata) else ""
        return f"{alone}list of {_count(metadata)}{kind_of(args[0])}"
    if origin is dict or annotation is Any:
        return "mapping"
    if args:
        return " | ".join(kind_of(arg) for arg in args)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        shape = "{" + ", ".join(annotation.model_fields) + "}"
        if not annotation.shorthand:
            return shape
        word = annotation.model_fields[annotation.shorthand].annotation
        return f"{kind_of(word) if get_origin(word) is Literal else annotation.shorthand} | {shape}"
    return _WORDS.get(annotation, str(annotation)) + _bounds(metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {bound}" for name, sign in signs.items() if (bound := _mark(metadata, name)) is not None]
    return " " + ", ".join(bounds) if bounds else ""


def _count(metadata: Iterable[Any]) -> str:
    least, most = _mark(metadata, "min_length"), _mark(metadata, "max_length")
    if least is None:
        return ""
    return f"{least} " if least == most else f"at least {least} "


def _mark(metadata: Iterable[Any], name: str) -> Any:
    """A bound among the annotations of a field; pydantic keeps some of them inside a field of their own."""
    marks = [inner for mark in metadata for inner in getattr(mark, "metadata", [mark])]
    return next((bound for mark in marks if (bound := getattr(mark, name, None)) is not None), None)
