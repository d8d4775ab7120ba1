"""How several layers of a run file become one: defaults < base < file < command line.

Mappings merge key by key, lists and scalars are replaced as a whole. Two refinements: an override may reach
into a list (`optim.groups.0.lr`), and of keys that exclude one another, setting one in a higher layer takes
the other out of the lower ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from bigtrain.config import keys
from bigtrain.config.keys import Path
from bigtrain.config.nodes import MAX_DEPTH, Node, Problems, read_yaml
from bigtrain.errors import Problem

COMMAND_LINE = "command line"

_EXCLUSIVE: dict[Path, tuple[frozenset[str], frozenset[str]]] = {
    ("train",): (frozenset({"epochs"}), frozenset({"steps"})),
    ("data", "eval"): (frozenset({"split"}), frozenset({"name", "args"})),
    ("eval",): (frozenset({"every_epochs"}), frozenset({"every_steps"})),
}


def read_overrides(overrides: Sequence[str], problems: Problems) -> Node:
    """One layer of all `a.b.c=VALUE`; of a key that is given twice the later one holds."""
    layer = Node({}, COMMAND_LINE)
    for override in overrides:
        node = _read_override(override, problems)
        if node is not None:
            layer = merge(layer, node, problems, exclude=False)
    return layer


def _read_override(override: str, problems: Problems) -> Node | None:
    name, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    path = name.strip().split(".")
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        said, remedy = f"{override!r} is not an override", "write key.path=VALUE, as in optim.lr=3e-4"
        problems.append(Problem(said, COMMAND_LINE, remedy=remedy))
        return None
    if path[0] == keys.BASE:
        said, remedy = "base cannot be given on the command line", "put it into the run file"
        problems.append(Problem(said, COMMAND_LINE, keys.BASE, remedy=remedy))
        return None
    found: Problems = []
    node = read_yaml(text, lambda line: COMMAND_LINE, found)
    problems += [Problem(f"{override!r}: {p.text}", p.where, name, remedy=p.remedy) for p in found]
    for part in reversed(path):
        node = Node({part: node}, COMMAND_LINE) if node else None
    return node


def merge(low: Node, high: Node, problems: Problems, path: Path = (), *, exclude: bool = True) -> Node:
    """The values of `high`, and where it has none those of `low`."""
    if isinstance(low.value, dict) and any(section.shorthand_is_one_key for section in keys.sections_at(path)):
        high = _expand(high, path)
    if not isinstance(high.value, dict):
        return high
    low = _expand(low, path)
    if isinstance(low.value, list):
        return _patch(low, high, problems, path, exclude=exclude)
    if not isinstance(low.value, dict):
        return high
    merged = dict(low.value)
    for name in _excluded(high, path) if exclude else ():
        merged.pop(name, None)
    for name, node in high.value.items():
        below = merged.get(name)
        merged[name] = merge(below, node, problems, (*path, name), exclude=exclude) if below else node
    # What is missing from a section is missing from a file, not from the command line.
    return Node(merged, low.origin if high.origin == COMMAND_LINE else high.origin)


def _expand(low: Node, path: Path) -> Node:
    """Write a name that stands for a section as that section, so that more can be merged into it."""
    if isinstance(low.value, str) and low.value != "none":
        shorthand = next((s.shorthand for s in keys.sections_at(path) if s.shorthand), None)
        return Node({shorthand: low}, low.origin) if shorthand else low
    return low


def _patch(low: Node, high: Node, problems: Problems, path: Path, *, exclude: bool) -> Node:
    """Merge `{0: …}` into the items of a list."""
    assert isinstance(low.value, list)
    assert isinstance(high.value, dict)
    if not all(map(keys.is_position, high.value)):
        return high
    items = list(low.value)
    for name, node in high.value.items():
        if int(name) < len(items):
            items[int(name)] = merge(items[int(name)], node, problems, (*path, int(name)), exclude=exclude)
            continue
        key = ".".join(map(str, (*path, name)))
        has = f"has {len(items)} items, counted from 0" if items else "has no items"
        problems.append(Problem(f"{key}: the list {has}", node.origin, key, remedy="give the whole list"))
    return Node(items, low.origin)


def _excluded(high: Node, path: Path) -> frozenset[str]:
    """The keys that what `high` sets takes out of lower layers."""
    assert isinstance(high.value, dict)
    given = {name for name, node in high.value.items() if node.value is not None}
    one, other = _EXCLUSIVE.get(path, (frozenset(), frozenset()))
    if given & one and not given & other:
        return other
    if given & other and not given & one:
        return one
    return frozenset()
