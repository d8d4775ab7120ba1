"""docs/keys.md and docs/errors.md are what the schema and the code say today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from bigtrain.errors import CombinationError, UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["keys", "errors"])
def test_the_page_is_up_to_date(generate: ModuleType, name: str) -> None:
    held = (ROOT / "docs" / f"{name}.md").read_text()
    assert held == getattr(generate, f"{name}_page")(), "run: python docs/generate.py"


def test_every_place_that_raises_is_listed(generate: ModuleType) -> None:
    assert generate.unlisted() == []


def test_most_errors_say_what_to_do(generate: ModuleType) -> None:
    found = [
        m for m in generate.messages() if issubclass(generate.CLASSES[m.kind], UserError) and m.kind != "ConfigError"
    ]
    without = [m for m in found if not m.remedy]
    assert len(found) > 100
    assert len(without) < len(found) / 3


def test_a_message_of_a_real_error_is_found_among_them(generate: ModuleType) -> None:
    from bigtrain.config.loader import load
    from launchers.plan import make_plan

    with pytest.raises(CombinationError) as caught:
        make_plan(load(ROOT / "configs/gpt.yaml", ["engine.name=single"]).config, Path("x"), [], nproc=2)
    words = caught.value.problem.split(", and")[0]
    assert words in (ROOT / "docs" / "errors.md").read_text()
