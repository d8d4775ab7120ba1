"""YAML as a tree in which every value knows where it stands.

Read from the event stream instead of by PyYAML's own constructors, for what those cannot do: keep lines,
refuse a key that is given twice, read the scalars of YAML 1.2 (`on` is a word, `1e-3` is a number), and
stop at a bound instead of in the middle of a recursion. Anchors and aliases work. Merge keys (`<<`), tags
and second documents are refused: a run file has `base:` for the first and no use for the others. Keys are
always words: `1: x` has the key "1".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from bigtrain.errors import Problem

Scalar: TypeAlias = bool | int | float | str | None
Problems: TypeAlias = list[Problem]

MAX_DEPTH = 64
MAX_NODES = 100_000

# https://yaml.org/spec/1.2.2/#103-core-schema
_CORE: tuple[tuple[str, re.Pattern[str], Callable[[str], Scalar]], ...] = (
    ("null", re.compile(r"null|Null|NULL|~|"), lambda text: None),
    ("bool", re.compile(r"true|True|TRUE"), lambda text: True),
    ("bool", re.compile(r"false|False|FALSE"), lambda text: False),
    ("int", re.compile(r"[-+]?[0-9]+"), int),
    ("int", re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    ("int", re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    ("float", re.compile(r"[-+]?(\.inf|\.Inf|\.INF)"), lambda text: float(text.replace(".", ""))),
    ("float", re.compile(r"\.nan|\.NaN|\.NAN"), lambda text: float("nan")),
)


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was given.

    Attributes:
        value: A scalar, a list of nodes, or nodes by key.
        origin: `file:line` (of the key, where there is one), `base file:line`, or `command line`.
    """

    value: Scalar | list[Node] | dict[str, Node]
    origin: str

    def child(self, part: object) -> Node | None:
        """The value at a key or a position, if it has one."""
        if isinstance(self.value, dict) and isinstance(part, str):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read_scalar(text: str) -> Scalar:
    """What an unquoted scalar means under the core schema of YAML 1.2.

    Raises:
        ValueError: Where Python refuses a number for its length.
    """
    for _, pattern, convert in _CORE:
        if pattern.fullmatch(text):
            return convert(text)
    return text


def scalar_patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Tag and pattern of everything that is not read as text, each anchored at both ends."""
    for name, pattern, _ in _CORE:
        yield f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern.pattern})\\Z")


def read_yaml(text: str, origin_of: Callable[[int], str], problems: Problems) -> Node | None:
    """Read one YAML document.

    Args:
        text: The document.
        origin_of: Names the place of a line, counted from 1.
        problems: Everything that is wrong is added here.

    Returns:
        The tree, or None where the text cannot be read to its end.
    """
    reader = _Reader(origin_of, problems)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        reader.report_syntax(error)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reader.report(f"the character {chr(error.character)!r} cannot stand in YAML", line, remedy="take it out")
    except _UnreadableError:
        pass
    else:
        return reader.root or Node(None, origin_of(1))
    return None


def from_python(value: object, origin: str, problems: Problems) -> Node | None:
    """Make the same tree of a Python value; what cannot stand in a run file is added to `problems`.

    Returns:
        The tree, or None where the value is deeper or larger than any run file.
    """
    budget = iter(range(MAX_NODES))

    def convert(value: object, path: tuple[str, ...]) -> Node:
        if len(path) > MAX_DEPTH or next(budget, None) is None:
            raise _UnreadableError
        if isinstance(value, Mapping):
            return Node({str(key): convert(item, (*path, str(key))) for key, item in value.items()}, origin)
        if isinstance(value, list | tuple):
            return Node([convert(item, (*path, str(i))) for i, item in enumerate(value)], origin)
        if value is None or type(value) in (bool, int, float, str):
            return Node(value, origin)  # type: ignore[arg-type]
        key = ".".join(path)
        problems.append(
            Problem(
                f"{key}: a {type(value).__name__} cannot stand in a run file",
                where=origin,
                key=key,
                remedy="use null, true, false, numbers, text, lists and mappings",
            )
        )
        return Node(None, origin)

    try:
        return convert(value, ())
    except _UnreadableError:
        said = f"deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} values"
        problems.append(Problem(said, where=origin, remedy="look for a list or mapping that holds itself"))
        return None


class _UnreadableError(Exception):
    """The rest of a document makes no sense any more; the reason is already among the problems."""


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been read."""

    value: list[Node] | dict[str, Node]
    anchor: str | None = None
    size: int = 1  # how many nodes it is, aliases counted as what they stand for
    height: int = 1  # how many levels it is, likewise
    key: str | None = None
    key_line: int = 0
    lines: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Reader:
    """Builds the tree event by event, with a stack of its own."""

    origin_of: Callable[[int], str]
    problems: Problems
    root: Node | None = None
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int, int]] = field(default_factory=dict)  # value, size, height

    def report(self, text: str, line: int, *, key: str | None = None, remedy: str | None = None) -> None:
        self.problems.append(Problem(text, where=self.origin_of(line), key=key, remedy=remedy))

    def report_syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        tab = "indent with spaces" if "'\\t'" in said else None
        remedy = tab or "check indentation, quotes and brackets; put text with special characters in quotes"
        self.report(f"this is not YAML: {said}", mark.line + 1 if mark else 1, remedy=remedy)

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        match event:
            case yaml.ScalarEvent():
                self._scalar(event, line)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._open(event, line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._close(line)
            case yaml.AliasEvent():
                self._alias(str(event.anchor), line)
            case yaml.DocumentStartEvent() if self.root is not None:
                self._stop("a second document begins here", line, remedy="keep one document in a file")

    def _stop(self, text: str, line: int, *, remedy: str) -> None:
        self.report(text, line, remedy=remedy)
        raise _UnreadableError

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        if self._expects_key():
            self._take_key(event, line)
            return
        self._refuse_tag(event, line)
        try:
            value = read_scalar(event.value) if event.implicit[0] else event.value
        except ValueError:
            value = event.value
            self.report(f"a number of {len(event.value)} digits is too long", line, remedy="put it in quotes")
        self._place(value, line)
        self._placed(line, size=1, height=0)
        if event.anchor:
            self.anchors[event.anchor] = (value, 1, 0)

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if self._expects_key():
            self._stop("a key has to be a word", line, remedy="write `key: value`")
        if len(self.stack) == MAX_DEPTH:
            self._stop(f"nested deeper than {MAX_DEPTH} levels", line, remedy="check the brackets")
        self._refuse_tag(event, line)
        opened = _Open({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor)
        self._place(opened.value, line)
        self.stack.append(opened)

    def _close(self, line: int) -> None:
        closed = self.stack.pop()
        if closed.anchor:
            self.anchors[closed.anchor] = (closed.value, closed.size, closed.height)
        self._placed(line, closed.size, closed.height)

    def _alias(self, name: str, line: int) -> None:
        if self._expects_key():
            self._stop("a key has to be a word", line, remedy=f"write out what *{name} stands for")
        if name not in self.anchors:
            inside = any(opened.anchor == name for opened in self.stack)
            said = "stands inside what it names" if inside else "has no anchor before it"
            self._stop(f"the alias *{name} {said}", line, remedy=f"put &{name} before a value above this line")
        value, size, height = self.anchors[name]
        self._place(value, line)
        self._placed(line, size, height)

    def _expects_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None

    def _take_key(self, event: yaml.ScalarEvent, line: int) -> None:
        opened, key = self.stack[-1], event.value
        dotted = ".".join([*self._path(), key])
        if key in opened.lines:
            said = f"{dotted} is given twice, here and in line {opened.lines[key]}"
            self.report(said, line, key=dotted, remedy="take one of them out")
        if key == "<<" and event.implicit[0]:
            self.report("merge keys (<<) are not read", line, key=dotted, remedy="use `base:`, or an alias as a value")
        opened.key, opened.key_line = key, line
        opened.lines.setdefault(key, line)

    def _path(self) -> Iterator[str]:
        for opened in self.stack[:-1]:
            yield opened.key if opened.key is not None else str(len(opened.value) - 1)

    def _refuse_tag(self, event: Any, line: int) -> None:
        if event.tag:
            self.report(f"the tag {event.tag} is not read", line, remedy="take it out; quotes make a value text")

    def _place(self, value: Any, line: int) -> None:
        """Put a value into what is open; a list or mapping is put there empty and filled afterwards."""
        if not self.stack:
            self.root = Node(value, self.origin_of(line))
            return
        opened = self.stack[-1]
        if isinstance(opened.value, list):
            opened.value.append(Node(value, self.origin_of(line)))
        elif opened.key is not None:
            opened.value[opened.key] = Node(value, self.origin_of(opened.key_line))

    def _placed(self, line: int, size: int, height: int) -> None:
        """Count a value that is complete into what is open."""
        if not self.stack:
            return
        opened = self.stack[-1]
        opened.key = None
        opened.size += size
        opened.height = max(opened.height, height + 1)
        if opened.size > MAX_NODES:
            self._stop(f"more than {MAX_NODES} values, aliases written out", line, remedy="write fewer")
        if len(self.stack) + height > MAX_DEPTH:
            self._stop(f"nested deeper than {MAX_DEPTH} levels, aliases written out", line, remedy="nest less")
