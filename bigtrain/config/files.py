"""Reading a run file from disk into nodes, and its base with it."""

from __future__ import annotations

from pathlib import Path

from bigtrain.config import keys
from bigtrain.config.layers import merge
from bigtrain.config.nearest import nearest_words
from bigtrain.config.nodes import Node, Problems, read_yaml
from bigtrain.errors import Problem

MAX_BYTES = 1 << 20


def read_file(path: Path, problems: Problems, *, prefix: str = "") -> Node | None:
    """The mapping in a run file; None where there is none, and why among the problems.

    Args:
        path: The file.
        problems: Everything that is wrong is added here.
        prefix: What stands before the file's name in every origin.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        problems.append(_no_file(path))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        problems.append(Problem(f"cannot read {path}: {_reason(error)}", remedy="give the path of a YAML file"))
    else:
        return _read_bytes(data, path, problems, prefix)
    return None


def with_base(node: Node, folder: Path, problems: Problems) -> Node | None:
    """A file over its base, where it names one; None where the base cannot be read.

    Args:
        node: The file's mapping.
        folder: What the base's path is relative to.
        problems: Everything that is wrong is added here.
    """
    given = node.child(keys.BASE)
    if given is None or given.value is None:
        return _without_base(node)
    if not isinstance(given.value, str):
        said = f"base: {keys.show(given.plain())} does not fit"
        problems.append(Problem(said, given.origin, keys.BASE, remedy="it takes the path of a run file"))
        return None
    found: Problems = []
    base = read_file(folder / given.value, found, prefix="base ")
    problems += [p if p.where else Problem(p.text, given.origin, keys.BASE, p.suggestions, p.remedy) for p in found]
    if base is None:
        return None
    second = base.child(keys.BASE)
    if second is not None:
        said, remedy = "a base cannot have a base itself", "put what both hold into one file"
        problems.append(Problem(said, second.origin, keys.BASE, remedy=remedy))
    return merge(_without_base(base), _without_base(node), problems)


def _without_base(node: Node) -> Node:
    assert isinstance(node.value, dict)
    return Node({name: child for name, child in node.value.items() if name != keys.BASE}, node.origin)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _no_file(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        return Problem(f"there is no file {path}", remedy=f"there is no folder {folder} either")
    names = sorted(p.name for p in folder.glob("[!.]*") if p.suffix in (".yaml", ".yml"))
    near = tuple(str(folder / name) for name in nearest_words(path.name, names))
    remedy = f"{folder.resolve()} holds {', '.join(names[:10]) or 'no run file'}"
    return Problem(f"there is no file {path}", suggestions=near, remedy=remedy)


def _read_bytes(data: bytes, path: Path, problems: Problems, prefix: str) -> Node | None:
    def origin_of(line: int) -> str:
        return f"{prefix}{path}:{line}"

    if len(data) > MAX_BYTES:
        said = f"{path} is larger than {MAX_BYTES} bytes"
        problems.append(Problem(said, remedy="give a run file; this is not one"))
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        said = f"the byte 0x{data[error.start]:02x} is not UTF-8"
        problems.append(Problem(said, origin_of(line), remedy="save the file as UTF-8"))
        return None
    node = read_yaml(text, origin_of, problems)
    if node is None or isinstance(node.value, dict):
        return node
    said = "the file is empty" if node.value is None else "the file is not a mapping of keys"
    problems.append(Problem(said, node.origin, remedy="write keys and values, beginning with `task: classification`"))
    return None
