"""Regression: sums against torch, scores against scikit-learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch import Tensor, nn

from bigtrain.errors import DataError, ModelError
from bigtrain.protocols import Batch
from bigtrain.tasks.regression import Regression


def make_batch(inputs: Tensor, targets: Tensor, num_valid: int | None = None) -> Batch:
    valid = len(targets) if num_valid is None else num_valid
    return Batch((inputs, targets), (torch.arange(len(targets)) < valid).float(), valid)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("outputs", "targets"), [((9, 1), (9,)), ((9,), (9,)), ((9, 3), (9, 3)), ((9,), (9, 1))])
def test_total_over_count_is_torchs_mean(outputs, targets):
    inputs, wanted = numbers(*outputs).requires_grad_(), numbers(*targets, seed=1)
    result = Regression().loss(nn.Identity(), make_batch(inputs, wanted))
    expected = F.mse_loss(inputs.reshape(9, -1), wanted.reshape(9, -1))
    torch.testing.assert_close(result.total / result.count, expected, rtol=1e-13, atol=0)
    (got,) = torch.autograd.grad(result.total / result.count, inputs)
    (want,) = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_samples_of_weight_0_count_nowhere():
    inputs, targets = numbers(9, 2), numbers(9, 2, seed=1)
    part = Regression().loss(nn.Identity(), make_batch(inputs[:6], targets[:6]))
    padded = Regression().loss(nn.Identity(), make_batch(inputs, targets, num_valid=6))
    assert padded.total == part.total
    assert padded.count == part.count == 12
    nothing = Regression().loss(nn.Identity(), make_batch(inputs, targets, num_valid=0))
    assert (nothing.total, nothing.count) == (0, 0)


def test_integer_targets_and_low_precision_outputs():
    inputs, targets = numbers(9).bfloat16(), torch.arange(9)
    result = Regression().loss(nn.Identity(), make_batch(inputs, targets))
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total.double(), ((inputs.double() - targets) ** 2).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("outputs", "targets"), [((9, 2), (9,)), ((9,), (9, 3)), ((8,), (9,)), ((), (9,))])
def test_nothing_is_broadcast(outputs, targets):
    with pytest.raises(ModelError, match="the model returns"):
        Regression().loss(nn.Identity(), make_batch(numbers(*outputs), numbers(*targets)))


def evaluate(preds: Tensor, targets: Tensor) -> dict[str, float]:
    metrics = Regression().metrics()
    for start in range(0, len(targets), 4):
        batch = make_batch(preds[start : start + 4], targets[start : start + 4])
        metrics.update(Regression().loss(nn.Identity(), batch), batch)
    padding = make_batch(preds[:4] + 7, targets[:4], num_valid=0)
    metrics.update(Regression().loss(nn.Identity(), padding), padding)
    return metrics.compute()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_scores_are_scikit_learns(outputs, scale, offset):
    targets = (numbers(21, outputs) + offset) * scale
    preds = targets + 0.3 * scale * numbers(21, outputs, seed=1)
    scores = evaluate(preds, targets)
    assert scores["mse"] == pytest.approx(mean_squared_error(targets, preds), rel=1e-12)
    assert scores["mae"] == pytest.approx(mean_absolute_error(targets, preds), rel=1e-12)
    assert scores["r2"] == pytest.approx(r2_score(targets, preds), rel=1e-10)


def test_constant_targets_and_few_samples():
    constant = torch.full((40,), 0.1, dtype=torch.float64)
    assert evaluate(constant, constant)["r2"] == 1
    assert evaluate(constant + 0.1, constant)["r2"] == 0
    assert math.isnan(evaluate(constant[:1] + 1, constant[:1])["r2"])
    assert evaluate(constant[:1] + 1, constant[:1])["mse"] == pytest.approx(1.0, rel=1e-15)
    assert Regression().metrics().compute() == {}


def test_check():
    model = nn.Linear(3, 1)
    Regression().check(model, make_batch(torch.zeros(5, 3), torch.zeros(5)))
    with pytest.raises(ModelError, match=r"returns float32\[5, 1\] for targets float32\[5, 2\]"):
        Regression().check(model, make_batch(torch.zeros(5, 3), torch.zeros(5, 2)))
    with pytest.raises(DataError, match=r"inputs: float32\[5, 4\]"):
        Regression().check(model, make_batch(torch.zeros(5, 4), torch.zeros(5)))
    with pytest.raises(DataError, match="not all finite"):
        Regression().check(model, make_batch(torch.zeros(5, 3), torch.full((5,), math.nan)))
