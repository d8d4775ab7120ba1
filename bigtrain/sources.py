"""What code of ours, of libraries and of users takes, read from its source: nothing is imported or run.

So a run file is checked in an instant, on a machine without torch, and without side effects. What the text of a module
does not tell for certain (a decorated function, a module made while it is imported) is left to the moment at which it
is imported: no answer is ever a guess.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The folder that stands for the current one where code is looked for: a copy that was made when a job was submitted.
CODE_VARIABLE = "BIGTRAIN_CODE"

_DEEPEST = 8  # how many modules may hand a name on
_MADE_WHILE_IMPORTED = re.compile(r"\bglobals\(\)|\bsys\.modules\b|^def __getattr__\b", re.MULTILINE)


@dataclass(frozen=True)
class Signature:
    """What a factory takes by name.

    Attributes:
        defaults: The text of the default of each argument; None where it has to be given.
        takes_any: Whether it takes others besides.
    """

    defaults: Mapping[str, str | None]
    takes_any: bool = False

    def __str__(self) -> str:
        shown = [name if default is None else f"{name}={default}" for name, default in self.defaults.items()]
        return ", ".join(shown) or "no arguments"

    @property
    def required(self) -> list[str]:
        """The arguments without a default."""
        return [name for name, default in self.defaults.items() if default is None]


class MissingError(Exception):
    """There is no such module, or no such name in it.

    Attributes:
        names: What the module has instead; None where it is the module that is missing.
    """

    def __init__(self, missing: str, names: list[str] | None = None) -> None:
        super().__init__(missing)
        self.missing = missing
        self.names = names


def signature(spec: str) -> Signature | None:
    """What `package.module:attribute` takes; None where its source does not tell.

    Raises:
        MissingError: Where there is for certain no such module or attribute.
    """
    module, _, attribute = spec.partition(":")
    return _signature_in(module, attribute, _DEEPEST)


def torchvision_builders() -> list[str]:
    """The builders that torchvision registers; empty where it is not installed."""
    folder = _folder_of("torchvision")
    if folder is None:
        return []
    registered = re.compile(r'^@register_model\((?:name="(\w+)")?\)\n(?:@.*\n(?:[ )].*\n)*)*def (\w+)', re.MULTILINE)
    files = sorted((folder / "models").rglob("*.py"))
    found = [match for file in files for match in registered.findall(file.read_text(encoding="utf-8"))]
    return sorted({given or function for given, function in found})


def torchvision_datasets() -> list[str]:
    """The names that torchvision's datasets offer; empty where it is not installed."""
    folder = _folder_of("torchvision")
    tree = _tree(folder / "datasets" / "__init__.py") if folder else None
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(statement.value)]
    return []


def torchvision_transforms() -> list[str]:
    """The names that torchvision's transforms (v2) offer, classes by their capital; empty where it is not installed."""
    folder = _folder_of("torchvision")
    tree = _tree(folder / "transforms" / "v2" / "__init__.py") if folder else None
    imported = [statement for statement in tree.body if isinstance(statement, ast.ImportFrom)] if tree else []
    names = [alias.asname or alias.name for statement in imported for alias in statement.names]
    return [name for name in names if name[0].isupper()]


def _signature_in(module: str, attribute: str, depth: int) -> Signature | None:
    path = _find_module(module)
    tree = _tree(path) if path else None
    if path is None or tree is None or depth == 0:
        return None
    names = _Names()
    names.take(tree.body)
    outer, _, inner = attribute.partition(".")
    found = names.defined.get(outer, [])
    if not found:
        is_there = hasattr(sys.modules.get(module), outer)  # put there by somebody else
        if names.are_all and not is_there and not _MADE_WHILE_IMPORTED.search(path.read_text(encoding="utf-8")):
            raise MissingError(f"{module}:{outer}", sorted(name for name in names.defined if name[0] != "_"))
        return None
    if len(found) > 1 or inner:  # defined in several ways, or inside something
        return None
    statement = found[0]
    if isinstance(statement, ast.ImportFrom):
        given = next(alias.name for alias in statement.names if (alias.asname or alias.name) == outer)
        return _handed_on(_absolute(module, path, statement), given, depth)
    return _signature_of(statement)


def _handed_on(module: str, attribute: str, depth: int) -> Signature | None:
    """The signature of what a module only imports; that it is there is the concern of that module."""
    try:
        return _signature_in(module, attribute, depth - 1)
    except MissingError:
        return None


class _Names:
    """The names that the body of a module defines, and by which statements."""

    def __init__(self) -> None:
        self.defined: dict[str, list[ast.stmt]] = {}
        self.are_all = True

    def take(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            for name in self._names(statement):
                self.defined.setdefault(name, []).append(statement)
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                for field in ("body", "orelse", "finalbody"):
                    self.take(getattr(statement, field, ()))
                for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                    self.take(part.body)

    def _names(self, statement: ast.stmt) -> Iterator[str]:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Import() | ast.ImportFrom():
                for alias in statement.names:
                    self.are_all &= alias.name != "*"
                    yield alias.asname or alias.name.partition(".")[0]
            case _:
                stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
                yield from {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def _signature_of(statement: ast.stmt) -> Signature | None:
    if isinstance(statement, ast.FunctionDef) and not statement.decorator_list:
        return _arguments(statement.args)
    if not isinstance(statement, ast.ClassDef) or statement.decorator_list or statement.keywords:
        return None
    methods = {item.name: item for item in statement.body if isinstance(item, ast.FunctionDef)}
    made = methods.get("__init__")
    if "__new__" in methods or (made and made.decorator_list):
        return None
    if made:
        return _arguments(made.args, skip=1)
    return None if statement.bases else Signature({})


def _arguments(given: ast.arguments, skip: int = 0) -> Signature | None:
    """Those that can be given by name, but for the first `skip`."""
    by_position = [*given.posonlyargs, *given.args]
    if len(given.posonlyargs) > skip:
        return None
    without = [None] * (len(by_position) - len(given.defaults))
    pairs = [*zip(by_position, [*without, *given.defaults], strict=True)][skip:]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    texts = {argument.arg: None if default is None else ast.unparse(default) for argument, default in pairs}
    return Signature(texts, given.kwarg is not None)


def _absolute(module: str, path: Path, statement: ast.ImportFrom) -> str:
    """The module that a `from … import` names, from inside another."""
    if not statement.level:
        return statement.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    base = package[: len(package) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


@cache
def _tree(path: Path) -> ast.Module | None:
    """The syntax of a file; None where it cannot be read or is not Python, which importing it tells better."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _folder_of(package: str) -> Path | None:
    try:
        path = _find_module(package)
    except MissingError:
        return None
    return path.parent if path else None


def _find_module(name: str) -> Path | None:
    """The file that holds a module; None where it is not written in Python, or is there already without a file.

    Raises:
        MissingError: Where there is none.
    """
    here = os.environ.get(CODE_VARIABLE) or str(Path.cwd())
    places: list[str] | None = [here, *sys.path]
    spec: importlib.machinery.ModuleSpec | None = None
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        part = ".".join(parts[:length])
        if part in sys.modules:
            spec = sys.modules[part].__spec__
            if spec is None:  # made in this process, as __main__ is
                return None
        else:
            spec = importlib.machinery.PathFinder.find_spec(part, places)
            if spec is None and length == 1:  # built in, or installed from a folder that is being worked on
                spec = importlib.util.find_spec(part)
        if spec is None:
            raise MissingError(part)
        places = list(spec.submodule_search_locations or ())
    origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None
