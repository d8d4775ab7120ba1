"""The exception tree: what it prints, what it exits with, and that it survives the way between processes."""

import inspect
import pickle
import re

import pytest

from bigtrain import errors
from bigtrain.errors import BigtrainError, ConfigError, DataError, Problem, TrainingError, UserError

EVERY_ERROR = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, BigtrainError)]


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {}
    parents = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+Error) ", line)
        if found:
            depth = len(found[1]) // 4
            parents[depth:] = [found[2]]
            drawn[found[2]] = parents[depth - 1] if depth else "Exception"
    assert drawn == {cls.__name__: cls.__base__.__name__ for cls in EVERY_ERROR}


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_user_errors_exit_with_2_and_the_others_with_1(cls):
    assert cls.exit_code == (2 if issubclass(cls, UserError) else 1)


def test_it_says_what_where_and_what_to_do():
    error = DataError("no images", where="data.args.root", remedy="give a folder\nwith images")
    assert str(error) == "no images\n  at: data.args.root\n  do: give a folder\n      with images"
    assert str(TrainingError("stopped")) == "stopped"


def test_a_problem_says_the_same_in_the_same_form():
    problem = Problem("a is wrong", "run.yaml:3", "a", (), "give a folder\nwith images")
    assert str(problem) == "run.yaml:3: a is wrong\n  do: give a folder\n      with images"


def test_a_config_error_holds_several_problems():
    first = Problem("there is no key a", "run.yaml:3", "a", ("b", "c"), "b: The b.")
    error = ConfigError([first, Problem("d is missing")])
    assert str(error) == "run.yaml:3: there is no key a\n  did you mean: b, c\n  do: b: The b.\nd is missing"
    assert ConfigError("wrong").problems == (Problem("wrong"),)


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_it_survives_pickling(cls):
    error = cls("broken") if issubclass(cls, ConfigError) else cls("broken", where="here", remedy="mend it")
    error.rank = 3
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.problem, again.where, again.rank) == (str(error), error.problem, error.where, 3)
