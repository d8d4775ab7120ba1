"""Copies of parameters in bfloat16: their gradients come back as they would through `to`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigtrain.engines import casting
from bigtrain.engines.casting import Casting


@pytest.fixture(params=["large", "small"])
def model(request, monkeypatch) -> nn.Module:
    monkeypatch.setattr(casting, "_LARGE", 1 if request.param == "large" else 1 << 60)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def test_gradients_are_those_through_to(model):
    x = torch.randn(4, 5)
    with Casting(model, torch.bfloat16, list(model.parameters())).copies():
        assert all(p.dtype == torch.bfloat16 for layer in model for p in layer._parameters.values())
        for _ in range(2):  # they add up, in float32
            model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        first, first_bias, second, second_bias = (p.to(torch.bfloat16) for p in model.parameters())
        y = nn.functional.linear(nn.functional.linear(x.bfloat16(), first, first_bias), second, second_bias)
        y.float().square().sum().backward()
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert gradient.dtype == p.dtype == torch.float32
        assert torch.equal(gradient, p.grad)


def test_a_gradient_of_a_gradient(model):
    """A task may differentiate a norm of the gradients by the weights."""
    weight = model[0].weight
    copy = casting._copy(weight, torch.bfloat16)
    (slope,) = torch.autograd.grad(copy.square().sum(), weight, create_graph=True)
    slope.sum().backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 2.0))
