"""Digests add up over parts, whatever the cut, and see a change of a single bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from bigtrain.finetune.digest import digest
from bigtrain.state import Box, boxes_of_slice, whole

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]


def wrapped(value):
    """As a signed integer of 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def filled(shape, dtype):
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    return (values * 100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 2, 5)])
def test_the_digests_of_parts_add_up(shape, dtype):
    full = filled(shape, dtype)
    expected = digest(full, shape, whole(shape))
    for cut in range(full.numel() + 1):
        slices = itertools.chain(boxes_of_slice(shape, 0, cut), boxes_of_slice(shape, cut, full.numel()))
        parts = [digest(full[box.slices], shape, box) for box, _ in slices]
        assert wrapped(sum(parts)) == expected


def test_chunks_change_nothing(monkeypatch):
    full = filled((37, 11), torch.float32)
    expected = digest(full, full.shape, whole(full.shape))
    monkeypatch.setattr("bigtrain.finetune.digest._CHUNK", 25)
    assert digest(full, full.shape, whole(full.shape)) == expected


def test_columns_that_are_not_contiguous_in_memory():
    full = filled((6, 8), torch.float32)
    left, right = Box((0, 0), (6, 3)), Box((0, 3), (6, 5))
    parts = digest(full[left.slices], (6, 8), left) + digest(full[right.slices], (6, 8), right)
    assert wrapped(parts) == digest(full, (6, 8), whole((6, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_change_is_seen(dtype):
    full = filled((3, 5), dtype)
    expected = digest(full, (3, 5), whole((3, 5)))
    for position in range(full.numel()):
        changed = full.clone()
        raw = torch.view_as_real(changed) if dtype.is_complex else changed
        raw.view(-1).view(torch.uint8)[position * raw.element_size()] ^= 1
        assert digest(changed, (3, 5), whole((3, 5))) != expected


def test_two_elements_that_change_places_are_seen():
    full = filled((64,), torch.float32)
    swapped = full.clone()
    swapped[[3, 9]] = full[[9, 3]]
    assert digest(swapped, (64,), whole((64,))) != digest(full, (64,), whole((64,)))


def test_the_sign_of_a_zero_is_seen():
    zeros = torch.zeros(4)
    assert digest(zeros, (4,), whole((4,))) != digest(-zeros, (4,), whole((4,)))


def test_nothing_has_the_digest_of_nothing():
    assert digest(torch.empty(0, 3), (0, 3), whole((0, 3))) == 0
