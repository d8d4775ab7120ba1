"""The one reader and writer of run files: a path, or a mapping, and overrides become a `Config`.

Precedence: command line > file > the file's `base:` > default. Everything that is wrong is reported
together, in one ConfigError, and every value remembers where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from bigtrain.config import keys
from bigtrain.config.combinations import clashes
from bigtrain.config.files import read_file, with_base
from bigtrain.config.layers import merge, read_overrides
from bigtrain.config.names import check_names
from bigtrain.config.nodes import Node, Problems, from_python, scalar_patterns
from bigtrain.config.problems import dotted, explain
from bigtrain.config.schema import Config
from bigtrain.errors import ConfigError, Problem

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run file, read.

    Attributes:
        config: Its values.
        origin: Where each came from, by dotted key: `command line`, `file:line`, `base file:line` or
            `default`.
        path: The file; None for a mapping.
    """

    config: Config
    origin: Mapping[str, str]
    path: Path | None = None


class Checks(NamedTuple):
    """What is checked besides the shape of a run file."""

    launched: bool


class Change(NamedTuple):
    """A value that differs between two run files; None where one of them does not have it."""

    key: str
    before: Any
    after: Any


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read a run file and its base, and lay overrides over them.

    Args:
        path: The run file.
        overrides: `a.b.c=VALUE`, the value in YAML; of a key that is given twice the later one holds.

    Raises:
        ConfigError: With everything that is wrong.
    """
    path = Path(path)
    problems: Problems = []
    return _resolve(read_file(path, problems), overrides, problems, path)


def check(path: str | Path, overrides: Sequence[str] = (), *, launched: bool = False) -> Resolved:
    """Read a run file, and refuse whatever can be known to be wrong before anything of it is imported or built.

    Args:
        path: The run file.
        overrides: As for `load`.
        launched: Whether it is to be started as its section `launch` says.

    Raises:
        ConfigError: As `load`; with names that are not there, arguments that do not fit, and choices that cannot
            work together.
    """
    path = Path(path)
    problems: Problems = []
    return _resolve(read_file(path, problems), overrides, problems, path, Checks(launched))


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Resolved:
    """Read a mapping of the shape of a run file; its `base:` is relative to the current directory.

    Raises:
        ConfigError: As `load`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError([Problem(f"a run file is a mapping of keys, not {keys.show(values)}", remedy="give a dict")])
    problems: Problems = []
    return _resolve(from_python(values, "config", problems), overrides, problems, None)


def loads(text: str) -> Config:
    """What `dump` was given.

    Raises:
        ConfigError: Where the text is not what `dump` of this version writes.
    """
    return from_dict(yaml.safe_load(text)).config


def _resolve(
    node: Node | None,
    overrides: Sequence[str],
    problems: Problems,
    path: Path | None,
    checks: Checks | None = None,
) -> Resolved:
    layer = read_overrides(overrides, problems)
    whole = node and with_base(node, path.parent if path else Path(), problems)
    if whole is None:
        raise _error(problems)
    tree = _with_name(merge(whole, layer, problems), path)
    if checks:
        problems += check_names(tree)
    try:
        config = Config.model_validate(tree.plain())
    except ValidationError as error:
        problems += explain(error, tree)
        raise _error(problems) from None
    if checks:
        problems += _clashing(config, tree, checks.launched)
    if problems:
        raise _error(problems)
    return Resolved(config, {dotted(at): _origin(tree, at) for at, _ in _leaves(config.model_dump())}, path)


def _clashing(config: Config, tree: Node, launched: bool) -> Iterator[Problem]:
    """Choices that cannot work together, at the place of the one to change, or of what comes nearest to it."""
    for clash in clashes(config, launched=launched):
        node = tree
        for part in clash.key.split("."):
            node = node.child(part) or node
        yield Problem(f"{clash.key}: {clash.text}", node.origin, clash.key, (), clash.remedy)


def _error(problems: Problems) -> ConfigError:
    """By file and line, the command line last."""

    def place(problem: Problem) -> tuple[bool, str, int]:
        name, _, line = (problem.where or "").rpartition(":")
        return (not line.isdecimal(), name, int(line) if line.isdecimal() else 0)

    return ConfigError(sorted(problems, key=place))


def _with_name(tree: Node, path: Path | None) -> Node:
    """Name the run after its file where nothing else names it."""
    run = tree.child("run") or Node(None, DEFAULT)
    if path is None or not isinstance(run.value, dict | None):
        return tree
    name = run.child("name")
    if name is not None and name.value is not None:
        return tree
    named = Node({"run": Node({"name": Node(path.stem, DEFAULT)}, run.origin)}, tree.origin)
    return merge(tree, named, [])


def _origin(tree: Node, path: keys.Path) -> str:
    node = tree
    for position, part in enumerate(path):
        child = node.child(part)
        if child is None:
            # A name alone stands for a section; what else is in that section is a default.
            is_name = not isinstance(node.value, dict | list) and path[position:] == ("name",)
            return node.origin if is_name else DEFAULT
        node = child
    return node.origin


def _leaves(value: Any, path: keys.Path = ()) -> Iterator[tuple[keys.Path, Any]]:
    """Every value that is not a section, with its path."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for position, item in enumerate(value):
            yield from _leaves(item, (*path, position))
    else:
        yield path, value


def values(config: Config) -> dict[str, Any]:
    """Every value of a run file by its dotted key."""
    return {dotted(path): value for path, value in _leaves(config.model_dump())}


def diff(before: Config, after: Config) -> list[Change]:
    """What differs between two run files, in the order of their keys."""
    old, new = values(before), values(after)
    both = dict.fromkeys([*old, *new])
    return [Change(key, old.get(key), new.get(key)) for key in both if old.get(key) != new.get(key)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, so that readers of both are right."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # The emitter writes some of the line breaks of Unicode as they are unless told to escape.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern in scalar_patterns():
    _Dumper.add_implicit_resolver(_tag, _pattern, None)  # type: ignore[no-untyped-call, unused-ignore]


def dump(config: Config) -> str:
    """The YAML of a run file, which loads back to an equal config."""
    plain = config.model_dump()
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
