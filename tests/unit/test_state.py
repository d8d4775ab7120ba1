"""Pieces put together, and read again by any cut."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.errors import StateError
from bigtrain.state import BUFFER, WEIGHT, Box, EngineState, MemoryReader, Piece, TensorSpec, assemble, whole


def make_piece(full: Tensor, box: Box, *, name: str = "w", kind: str = WEIGHT, is_owner: bool = True) -> Piece:
    return Piece(name, kind, tuple(full.shape), full.dtype, box, full[box.slices].clone(), is_owner)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cover it: each cut halves one box somewhere along one dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, size[dim]))  # one half may be empty, as where a dimension is smaller than the world
        lower = Box(offset, (*size[:dim], first, *size[dim + 1 :]))
        upper_offset = (*offset[:dim], offset[dim] + first, *offset[dim + 1 :])
        boxes += [lower, Box(upper_offset, (*size[:dim], size[dim] - first, *size[dim + 1 :]))]
    return shape, boxes


@settings(deadline=None)
@given(cuts(), st.data())
def test_any_cut_over_any_ranks_comes_together_again(cut, data):
    shape, boxes = cut
    full = numbered(shape, data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64])))
    ranks = [EngineState([], {"w": {"lr": 0.1}}) for _ in range(data.draw(st.integers(1, 4)))]
    for box in boxes:
        owner = data.draw(st.sampled_from(ranks))
        for state in ranks:
            if state is owner or data.draw(st.booleans()):  # others may hold copies
                state.pieces.append(make_piece(full, box, is_owner=state is owner))
    reader = assemble(ranks)
    assert reader.index == {(WEIGHT, "w"): TensorSpec(shape, full.dtype)}
    assert torch.equal(reader.tensors[WEIGHT, "w"], full)
    assert reader.hyper == {"w": {"lr": 0.1}}


@settings(deadline=None)
@given(cuts(), st.data())
def test_any_box_can_be_read_of_any_cut(cut, data):
    shape, boxes = cut
    full = numbered(shape)
    reader = assemble([EngineState([make_piece(full, box) for box in boxes], {})])
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = Box(tuple(begin for begin, _ in ends), tuple(end - begin for begin, end in ends))
    out = torch.full(box.size, -1.0)
    reader.read_into(WEIGHT, "w", box, out)
    assert torch.equal(out, full[tuple(slice(*pair) for pair in ends)])


@settings(deadline=None)
@given(cuts(), st.data())
def test_holes_are_found(cut, data):
    shape, boxes = cut
    filled = [box for box in boxes if math.prod(box.size)]
    missing = data.draw(st.sampled_from(filled))
    pieces = [make_piece(numbered(shape), box, is_owner=box is not missing) for box in boxes]
    with pytest.raises(StateError, match="exactly once: weight w"):
        assemble([EngineState(pieces, {})])


@settings(deadline=None)
@given(cuts(), st.data())
def test_overlaps_are_found(cut, data):
    shape, boxes = cut
    twice = data.draw(st.sampled_from([box for box in boxes if math.prod(box.size)]))
    states = [EngineState([make_piece(numbered(shape), box) for box in part], {}) for part in (boxes, [twice])]
    with pytest.raises(StateError, match="exactly once: weight w"):
        assemble(states)


def test_an_overlap_does_not_make_up_for_a_hole():
    full = numbered((4, 3))
    upper = make_piece(full, Box((0, 0), (2, 3)))
    with pytest.raises(StateError, match="exactly once: weight w"):  # as many elements as there should be
        assemble([EngineState([upper], {}), EngineState([upper], {})])


def test_every_wrong_tensor_is_named_and_kinds_are_apart():
    full = numbered((4, 3))
    half = Box((0, 0), (2, 3))
    pieces = [
        make_piece(full, whole(full.shape)),
        make_piece(full, half, kind="exp_avg"),
        make_piece(full, half, name="v", kind=BUFFER),
    ]
    with pytest.raises(StateError, match=r"exactly once: buffer v, exp_avg w$"):
        assemble([EngineState(pieces, {})])


def test_ranks_that_disagree_on_a_tensor():
    piece = make_piece(numbered((4, 3)), Box((0, 0), (2, 3)))
    for other in (replace(piece, shape=(4, 2)), replace(piece, dtype=torch.float64, is_owner=False)):
        with pytest.raises(StateError, match=r"weight w is .* on one rank, .* on another"):
            assemble([EngineState([piece], {}), EngineState([other], {})])


def test_reading_and_writing_go_through_autograd_and_dtypes():
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    piece = Piece("w", WEIGHT, (4, 3), weight.dtype, whole((4, 3)), weight, True)
    reader = MemoryReader({(WEIGHT, "w"): numbered((4, 3), torch.float64)}, {})
    reader.read_into("weight", "w", piece.box, weight)  # in place, into a leaf that wants gradients
    assert torch.equal(weight, numbered((4, 3)))
    assert torch.equal(assemble([EngineState([piece], {})]).tensors[WEIGHT, "w"], weight)
