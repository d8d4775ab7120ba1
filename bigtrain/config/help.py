"""The sentence of help that stands under each field of the schema.

It is read from the source, once, when somebody asks: pydantic would do so for each class at import, which
is a good part of the time that a command takes to start.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache

from bigtrain.config.fields import Section


def help_of(section: type[Section], field: str) -> str:
    """The help of a field, one's own or inherited; empty where the source is not at hand."""
    classes = [cls for cls in section.__mro__ if issubclass(cls, Section)]
    found = (_help_in(cls.__module__).get((cls.__name__, field)) for cls in classes)
    return next((text for text in found if text), "")


@cache
def _help_in(module: str) -> dict[tuple[str, str], str]:
    """Every string that follows a field in a module, by class and field."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:
        return {}
    found = {}
    for section in tree.body:
        if not isinstance(section, ast.ClassDef):
            continue
        for field, below in zip(section.body, section.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[section.name, field.target.id] = _text(below)
    return found


def _text(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value))
    return ""
