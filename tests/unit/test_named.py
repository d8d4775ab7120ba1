"""Finding and calling what a run file names."""

import statistics
import sys
from pathlib import Path

import pytest

from bigtrain.errors import DataError, ModelError, UserError
from bigtrain.named import call, load, nearest, suggest


def make(width: int, depth: int = 2, *, tied: bool = False) -> tuple[int, int, bool]:
    if width < 0:
        raise ValueError("a negative width")
    return width, depth, tied


def make_any(width: int, **others: object) -> dict[str, object]:
    return {"width": width, **others}


def call_make(args: dict[str, object], factory=make, **keywords):
    return call(factory, args, name="thing", error=ModelError, where="model.args", **keywords)


def test_calls_with_arguments_that_fit():
    assert call_make({"width": 3, "tied": True}) == (3, 2, True)
    assert call_make({"width": 3, "colour": "red"}, make_any) == {"width": 3, "colour": "red"}


def test_wrong_argument_shows_the_nearest_and_the_signature():
    with pytest.raises(ModelError) as caught:
        call_make({"width": 3, "dept": 4})
    assert "'dept'" in caught.value.problem
    assert caught.value.where == "model.args"
    assert caught.value.remedy == "did you mean depth? it takes: width, depth=2, tied=False"


def test_missing_argument_is_named():
    with pytest.raises(ModelError, match="thing needs width"):
        call_make({"depth": 3})


def test_accepted_names_close_open_keywords():
    assert call_make({"width": 1, "colour": "red"}, make_any, accepted=["colour"])["colour"] == "red"
    with pytest.raises(ModelError) as caught:
        call_make({"width": 1, "color": "red"}, make_any, accepted=["colour"])
    assert "did you mean colour?" in str(caught.value)


def test_failing_factory_says_what_and_where():
    with pytest.raises(ModelError) as caught:
        call_make({"width": -1})
    assert caught.value.problem == "thing failed: ValueError: a negative width"
    assert f"{Path(__file__)}:{make.__code__.co_firstlineno + 2}" in str(caught.value.where)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_failure_in_a_library_names_the_users_own_line():
    def make_from_words(width: str) -> float:
        return statistics.mean([width])  # fails deep in the standard library

    with pytest.raises(ModelError) as caught:
        call_make({"width": "three"}, make_from_words)
    assert f"{Path(__file__)}:{make_from_words.__code__.co_firstlineno + 1}" in str(caught.value.where)


def test_imported_modules_are_not_suggested(tmp_path, monkeypatch):
    (tmp_path / "importing.py").write_text("import math\n\ndef mass(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load("importing:matt", error=ModelError, where="model.name")
    assert caught.value.remedy == "did you mean mass?"


def test_an_error_of_ours_is_passed_on():
    def refuse() -> None:
        raise DataError("no such file")

    with pytest.raises(DataError, match="no such file"):
        call_make({}, refuse)


def test_loads_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_things.py").write_text("class Thing:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load("my_things:Thing", error=UserError, where="model.name").__name__ == "Thing"
    with pytest.raises(UserError) as caught:
        load("my_things:Thin", error=UserError, where="model.name")
    assert caught.value.remedy == "did you mean Thing?"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("no_such_package.models:make", "there is no module 'no_such_package'"),
        ("bigtrain.no_such_module:make", "there is no module 'bigtrain.no_such_module'"),
        ("bigtrain.errors:", "not of the form"),
        (":make", "not of the form"),
        ("errors", "not of the form"),
    ],
)
def test_what_cannot_be_loaded(spec, problem):
    with pytest.raises(ModelError, match=problem):
        load(spec, error=ModelError, where="model.name")


def test_a_module_that_fails_to_import_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("\nimport surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load("half_there:Thing", error=ModelError, where="model.name")
    assert caught.value.problem.startswith("importing half_there failed: ModuleNotFoundError")
    assert "half_there.py:2" in str(caught.value.where)


def test_nearest_ignores_case_and_suggest_lists_all_when_none_is_near():
    assert nearest("ResNet18", ["resnet18", "vgg11"]) == ["resnet18"]
    assert suggest("zzz", ["resnet18", "vgg11"], "models") == "the models are: resnet18, vgg11"
