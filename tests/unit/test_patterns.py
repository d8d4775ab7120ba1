"""Patterns over parameter names."""

import pytest

from bigtrain.errors import PatternError
from bigtrain.patterns import match_names

NAMES = ["stem.weight", "layers.0.norm.weight", "layers.0.up.weight", "layers.10.up.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], NAMES),
        (["head.*"], ["head.weight", "head.bias"]),
        (["layers.*"], NAMES[1:4]),  # dots are matched too
        (["layers.?.*"], NAMES[1:3]),
        (["layers.[0-3].up.*"], ["layers.0.up.weight"]),
        (["head.bias", "stem.*"], ["stem.weight", "head.bias"]),  # in the order of the names
        (["head.*", "*.bias"], ["head.weight", "head.bias"]),  # each once
        ([], []),
    ],
)
def test_matches_in_the_order_of_the_names(patterns, expected):
    assert match_names(patterns, NAMES, where="finetune.freeze") == expected


@pytest.mark.parametrize("pattern", ["heads.*", "head", "HEAD.*", "layers.1.*", "weight"])
def test_each_pattern_has_to_match(pattern):
    with pytest.raises(PatternError) as caught:
        match_names(["head.*", pattern], NAMES, where="finetune.freeze")
    assert repr(pattern) in caught.value.problem
    assert caught.value.where == "finetune.freeze"


def test_names_that_look_alike_are_shown():
    with pytest.raises(PatternError) as caught:
        match_names(["haed.bias"], NAMES, where="optim.groups.0.match")
    assert "head.bias" in caught.value.remedy
    with pytest.raises(PatternError) as caught:
        match_names(["zzzz"], NAMES, where="optim.groups.0.match")
    assert "stem.weight" in caught.value.remedy
