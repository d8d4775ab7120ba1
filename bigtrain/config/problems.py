"""From what pydantic found wrong to what a person can act on: the place, the value, what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from bigtrain.config import keys
from bigtrain.config.fields import REFUSED
from bigtrain.config.keys import Path, show
from bigtrain.config.nearest import nearest_keys, nearest_words
from bigtrain.config.nodes import Node
from bigtrain.errors import Problem

# What other tools call it.
_ELSEWHERE = {
    "gpu": "cuda",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "zero": "deepspeed",
    **dict.fromkeys(("fp16", "float16", "half"), "bf16"),
}
# Why what they have is not here.
_NOT_HERE = dict.fromkeys(("fp16", "float16", "half"), "float16 needs its loss scaled, and bf16 does not; ")


def explain(error: ValidationError, tree: Node) -> list[Problem]:
    """One problem for each place at which the values of the tree do not fit the schema."""
    found: dict[Path, Problem] = {}
    missing: list[Path] = []
    for detail in error.errors(include_url=False):
        path, node = _locate(detail["loc"], tree)
        match detail["type"]:
            case "missing":
                missing.append((*path, str(detail["loc"][-1])))
            case "extra_forbidden":
                found[path] = _unknown_key(path, node, tree)
            case other if path not in found:
                found[path] = _misfit(other, path, node, detail)
    # Where a key takes several shapes, what is wrong inside the shape that was given says more than that none fits.
    explained = {path[:length] for path in (*found, *missing) for length in range(len(path))}
    told = {path: p for path, p in found.items() if path not in explained or not _section_at(tree, path)}
    return [*told.values(), *_missing(missing, tree, told)]


def _locate(loc: tuple[int | str, ...], tree: Node) -> tuple[Path, Node]:
    """The path of an error in what was given; parts that were not given, as the name of a shape, fall out."""
    path: list[str | int] = []
    node = tree
    for part in loc:
        child = node.child(part)
        if child is not None:
            path.append(part)
            node = child
    return tuple(path), node


def dotted(path: Path) -> str:
    """A path as it is written on the command line."""
    return ".".join(map(str, path))


def _unknown_key(path: Path, node: Node, tree: Node) -> Problem:
    wrong, parent = str(path[-1]), path[:-1]
    here = keys.keys_at(parent)
    given = _section_at(tree, parent)
    if wrong in {key.name for key in here}:
        return _other_shape(path, node, [name for name in given if name != wrong])
    name = dotted(path)
    known = [key for key in keys.all_keys() if key.path == wrong]
    if "." in wrong and known:
        return Problem(f"{wrong} is given as one key", node.origin, name, (), f"nest it: {_nested(wrong)}")
    meant = nearest_keys(wrong, here, keys.all_keys(), given)
    remedy = "\n".join(map(str, meant)) or f"{_where(parent)} takes {', '.join(key.name for key in here)}"
    return Problem(f"there is no key {name}", node.origin, name, tuple(key.path for key in meant), remedy)


def _other_shape(path: Path, node: Node, others: list[str]) -> Problem:
    remedy = f"keep {path[-1]} or {', '.join(others)}"
    return Problem(f"{dotted(path)} cannot stand beside {', '.join(others)}", node.origin, dotted(path), (), remedy)


def _nested(key: str) -> str:
    *outer, last = key.split(".")
    return "".join(f"{part}: {{" for part in outer) + f"{last}: …" + "}" * len(outer)


def _where(path: Path) -> str:
    return dotted(path) or "a run file"


def _section_at(tree: Node, path: Path) -> Mapping[str, Node]:
    """What is given in the section at a path."""
    node: Node | None = tree
    for part in path:
        node = node.child(part) if node else None
    return node.value if node and isinstance(node.value, dict) else {}


def _missing(paths: list[Path], tree: Node, found: Mapping[Path, Problem]) -> Iterator[Problem]:
    """What has to be given and is not, except where a key was only misspelt."""
    for path in paths:
        name = dotted(path)
        unknown = [p for at, p in found.items() if at[:-1] == path[:-1] and p.text.startswith("there is no key")]
        several_shapes = len(keys.sections_at(path[:-1])) > 1
        if path[:-1] in found or any(several_shapes or problem.suggestions[:1] == (name,) for problem in unknown):
            continue
        _, parent = _locate(path[:-1], tree)
        key = next(key for key in keys.keys_at(path[:-1]) if key.name == path[-1])
        yield Problem(f"{name} is missing", parent.origin, name, (), str(key))


def _misfit(kind: str, path: Path, node: Node, detail: Mapping[str, Any]) -> Problem:
    name = dotted(path)
    value = node.plain()
    # A word that stands for a section is checked as one of its keys.
    field = keys.field_at((*path, *detail["loc"][-1:])) or keys.field_at(path)
    shown = name if isinstance(value, dict) and kind == REFUSED else f"{name}: {show(value)}"
    if kind == REFUSED:
        near = nearest_words(
            str(value).rpartition(".")[2], detail["ctx"]["words"]
        )  # of torch.optim.AdamW the last part
        return Problem(f"{shown} {detail['msg']}", node.origin, name, tuple(near), detail["ctx"]["remedy"])
    assert field is not None  # pydantic only finds fault with fields
    words = _words(field.annotation)
    near, why = nearest_words(value, words) if isinstance(value, str) else [], ""
    if isinstance(value, str) and _ELSEWHERE.get(value) in words:
        near, why = [_ELSEWHERE[value]], _NOT_HERE.get(value, "")
    takes = keys.kind_of(field.annotation, field.metadata)
    quote = "; put it in quotes" if "text" in takes and isinstance(value, bool | int | float) else ""
    return Problem(f"{shown} does not fit", node.origin, name, tuple(near), f"{why}it takes: {takes}{quote}")


def _words(annotation: Any) -> list[str]:
    """The words that a value may be."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) for word in _words(inner)]
