"""docs/run_file.md names every model, data source and task, with its arguments and their defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.catalogue import DATA, MODELS, SYNTHETIC_KINDS, TASKS
from bigtrain.named import load

TEXT = (Path(__file__).parents[2] / "docs/run_file.md").read_text()
OWN = {"Models": MODELS, "Data": DATA, "Tasks": TASKS}
ROWS = {
    heading: dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE))
    for heading, section in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}


def shown(text: str) -> dict[str, Any]:
    """The arguments in a cell, and their defaults: they stand before its first sentence ends."""
    words = re.findall(r"`([^`]+)`", text)
    return {name: yaml.safe_load(value) if value else None for name, _, value in (w.partition("=") for w in words)}


def taken(call: Any) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters.values()
    found = {
        p.name: p.default
        for p in parameters
        if p.name not in ("self", "split") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return {name: None if value is inspect.Parameter.empty else value for name, value in found.items()}


@pytest.mark.parametrize(
    ("heading", "name"), [(heading, name) for heading in OWN for name in OWN[heading] if name != "synthetic"]
)
def test_arguments(heading: str, name: str) -> None:
    arguments = taken(load(OWN[heading][name], error=AssertionError, where=name))
    assert shown(ROWS[heading][name].partition(". ")[0]) == arguments


@pytest.mark.parametrize("kind", sorted(SYNTHETIC_KINDS))
def test_arguments_of_synthetic_data(kind: str) -> None:
    (cell,) = re.findall(rf"`{kind}` \(([^)]*)\)", ROWS["Data"]["synthetic"])
    factory = load(SYNTHETIC_KINDS[kind], error=AssertionError, where=kind)
    arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in taken(factory).items()}
    assert shown(cell) == arguments


def test_nothing_else_is_named() -> None:
    for heading, table in OWN.items():
        assert {name for name in ROWS[heading] if "/" not in name and ":" not in name} == set(table)
