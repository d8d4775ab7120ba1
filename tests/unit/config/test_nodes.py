"""The YAML that run files are written in: scalars, lines, bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.nodes import MAX_DEPTH, MAX_NODES, from_python, read_scalar, read_yaml


def read(text):
    problems = []
    node = read_yaml(text, lambda line: f"f:{line}", problems)
    return node, problems


def value_of(text):
    node, problems = read(text)
    assert not problems
    return node.plain()


def problem_of(text):
    problems = read(text)[1]
    assert len(problems) == 1
    return problems[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        *(
            (word, word)
            for word in ("on", "off", "yes", "No", "y", "1_000", "12:30:45", "2020-01-01", "0b11", "nan", "e3")
        ),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = read_scalar(text)
    assert got == value
    assert type(got) is type(value)


def test_nan_is_a_number():
    assert math.isnan(read_scalar(".nan"))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_to_the_last_bit(number):
    assert read_scalar(repr(number)) == number


def test_quotes_make_text():
    assert value_of("""{a: "1", b: '1e-3', c: "null", d: ""}""") == {"a": "1", "b": "1e-3", "c": "null", "d": ""}
    assert value_of("a: |\n  1\n") == {"a": "1\n"}


def test_keys_are_words():
    assert value_of("{1: a, true: b, on: c, '<<': d}") == {"1": "a", "true": "b", "on": "c", "<<": "d"}


def test_every_value_knows_its_line():
    node, _ = read("a: 1\nb:\n  - x\n  - c:\n      3\n")
    assert node.child("a").origin == "f:1"
    assert node.child("b").child(0).origin == "f:3"
    assert node.child("b").child(1).child("c").origin == "f:4"
    assert node.child("b").child(2) is None
    assert node.child("a").child("x") is None


def test_anchors_and_aliases():
    node, problems = read("a: &x {lr: 1}\nb: *x\nc: [*x, &y 3, *y]\n")
    assert not problems
    assert node.plain() == {"a": {"lr": 1}, "b": {"lr": 1}, "c": [{"lr": 1}, 3, 3]}
    assert node.child("b").origin == "f:2"


def test_a_key_given_twice_names_both_lines():
    problem = problem_of("a: 1\nb:\n- x\n- c: 2\n  d: 0\n  c: 3\n")
    assert problem.text == "b.1.c is given twice, here and in line 4"
    assert problem.where == "f:6"


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("a: [1, 2\nb: 3", "not YAML", 2),
        ("a: 'x\n", "unexpected end", 2),
        ("a: b: c", "mapping values are not allowed", 1),
        ("ok: 1\nb: \x01", "cannot stand in YAML", 2),
        ("a: 1\n---\nb: 2", "second document", 2),
        ("a: !!str 3", "tag", 1),
        ("a: 1\nb: !mine {c: 1}", "tag !mine", 2),
        ("a: 1\n<<: {a: 1}", "merge keys", 2),
        ("? [1, 2]\n: 3", "a key has to be a word", 1),
        ("a: &x 1\n*x : 2", "a key has to be a word", 2),
        ("a: *x", "has no anchor", 1),
        ("a: &x [*x]", "stands inside what it names", 1),
        ("a: " + "9" * 5000, "too long", 1),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text, said, line):
    problem = problem_of(text)
    assert said in problem.text
    assert problem.where == f"f:{line}"


def test_a_tab_is_named():
    assert problem_of("a:\n\tb: 1").remedy == "indent with spaces"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "a: " + "{a: " * 10_000,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        "a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40,
    ],
    ids=["lists", "mappings", "indented", "through an alias"],
)
def test_deep_nesting_ends_in_one_problem(text):
    node, problems = read(text)
    assert node is None
    assert [f"deeper than {MAX_DEPTH} levels" in problem.text for problem in problems] == [True]


def test_aliases_cannot_multiply_without_bound():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    node, problems = read("\n".join(lines))
    assert node is None
    assert f"more than {MAX_NODES} values" in problems[0].text


def test_many_small_lists_are_bounded_together():
    wide = "a: &a [" + ", ".join(["1"] * 1000) + "]\n"
    node, problems = read(wide + "".join(f"b{i}: [*a]\n" for i in range(200)))
    assert node is None
    assert "more than" in problems[0].text


def test_python_values_become_the_same_tree():
    problems = []
    given = {"a": 1, "b": [1.5, None, {"c": "x"}], "d": (True,), 3: "three"}
    node = from_python(given, "config", problems)
    assert not problems
    assert node.plain() == {"a": 1, "b": [1.5, None, {"c": "x"}], "d": [True], "3": "three"}


def test_python_values_that_no_file_can_hold_are_named():
    problems = []
    from_python({"model": {"args": {"act": print, "n": [1, {2}]}}}, "config", problems)
    assert [problem.key for problem in problems] == ["model.args.act", "model.args.n.1"]


def test_a_python_value_that_holds_itself_is_refused():
    endless = {}
    endless["again"] = endless
    problems = []
    assert from_python(endless, "config", problems) is None
    assert f"deeper than {MAX_DEPTH}" in problems[0].text
