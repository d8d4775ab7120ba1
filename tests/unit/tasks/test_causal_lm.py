"""Language modelling: sums against a loop over tokens."""

import math

import pytest
import torch
from torch import Tensor, nn

from bigtrain import models, tasks
from bigtrain.errors import CombinationError, DataError, ModelError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.causal_lm import CausalLM

VOCAB = 11


def make_model() -> nn.Module:
    torch.manual_seed(1)
    args = {"vocab": VOCAB, "layers": 1, "width": 8, "heads": 2, "context": 6}
    return models.build("gpt", args).double()


def make_data(**others: Tensor) -> dict[str, Tensor]:
    return {"tokens": torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(2)), **others}


def make_batch(data: object, num_valid: int = 4) -> Batch:
    return Batch(data, (torch.arange(4) < num_valid).float(), num_valid, indices=[30, 10, 20, 50])


def sum_by_hand(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """Over all targets that are not negative."""
    total, count = 0.0, 0
    for row, ids in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, target in zip(row, ids, strict=True):
            if target >= 0:
                total += math.log(sum(math.exp(score) for score in scores)) - scores[target]
                count += 1
    return total, count


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [5] * 7, [1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 3, 3, 3, 9]])


def test_the_next_token_is_the_target():
    model, data = make_model(), make_data()
    result = CausalLM().loss(model, make_batch(data, num_valid=3))
    total, count = sum_by_hand(model(data["tokens"][:3, :-1]), data["tokens"][:3, 1:])
    assert result.total.item() == pytest.approx(total, rel=1e-12)
    assert result.count == count == 18


def test_a_target_in_another_document_does_not_count():
    model, data = make_model(), make_data(documents=DOCUMENTS)
    result = CausalLM().loss(model, make_batch(data))
    targets = data["tokens"][:, 1:].clone()
    for row in range(4):
        for t in range(6):
            if DOCUMENTS[row, t] != DOCUMENTS[row, t + 1]:
                targets[row, t] = -1
    total, count = sum_by_hand(model(data["tokens"][:, :-1], DOCUMENTS[:, :-1]), targets)
    assert result.total.item() == pytest.approx(total, rel=1e-12)
    assert result.count == count == 15


def test_targets_of_ones_own():
    model, data = make_model(), make_data()
    targets = data["tokens"][:, 1:].clone()
    targets[:, :2] = -100
    targets[3] = -100
    result = CausalLM().loss(model, make_batch({**data, "targets": targets}))
    total, count = sum_by_hand(model(data["tokens"][:, :-1]), targets)
    assert result.total.item() == pytest.approx(total, rel=1e-12)
    assert result.count == count == 12


def test_a_microbatch_without_targets_has_a_gradient_of_zero():
    model, data = make_model(), make_data(targets=torch.full((4, 6), -100))
    result = CausalLM().loss(model, make_batch(data))
    result.total.backward()
    assert result.total == 0
    assert result.count == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_the_loss_of_a_bfloat16_model_is_float32():
    model, data = make_model().bfloat16(), make_data()
    result = CausalLM().loss(model, make_batch(data))
    total, _ = sum_by_hand(model(data["tokens"][:, :-1]).double(), data["tokens"][:, 1:])
    assert result.total.dtype == torch.float32
    assert result.total.item() == pytest.approx(total, rel=1e-6)


def test_metrics():
    task, model = CausalLM(), make_model()
    metrics = task.metrics()
    totals, counts = [], []
    for data in (make_data(), make_data(documents=DOCUMENTS)):
        batch = make_batch(data)
        result = task.loss(model, batch)
        metrics.update(result, batch)
        totals.append(result.total.item())
        counts.append(int(result.count))
    scores = metrics.compute()
    assert scores["tokens"] == sum(counts) == 24 + 15
    assert scores["loss"] == pytest.approx(sum(totals) / sum(counts), rel=1e-14)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(totals) / sum(counts)), rel=1e-14)


def test_an_evaluation_without_samples():
    scores = CausalLM().metrics().compute()
    assert scores["tokens"] == 0
    assert math.isnan(scores["loss"])


def test_sums_are_float64_whatever_the_losses_are():
    metrics = CausalLM().metrics()
    batch = make_batch(make_data())
    for _ in range(1000):  # in float32 the eighth would be lost beside 2**24
        metrics.update(LossSum(torch.tensor(2.0**24 + 2), 1.0), batch)
        metrics.update(LossSum(torch.tensor(0.125), 0.0), batch)
    assert metrics.compute()["loss"] == 2.0**24 + 2 + 0.125


# ------------------------------------------------------------------------ models that sum the losses themselves


class Recorded(nn.Module):
    """A model of ours that keeps what it was asked for, and what it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = make_model(), []

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sum_cross_entropy_of: Tensor | None = None
    ) -> Tensor:
        answer = self.inner(tokens, documents, sum_cross_entropy_of)
        self.calls.append((tokens, sum_cross_entropy_of, answer))
        return answer


def checked_task(model: nn.Module, batch: Batch) -> CausalLM:
    task = CausalLM()
    task.check(model, batch)
    return task


OWN_TARGETS = torch.where(torch.arange(6) % 3 == 1, -100, torch.arange(24).view(4, 6) % VOCAB)


@pytest.mark.parametrize("num_valid", [4, 3, 0])
@pytest.mark.parametrize("others", [{}, {"documents": DOCUMENTS}, {"targets": OWN_TARGETS}])
def test_the_sum_of_the_model_is_that_of_its_logits(others, num_valid):
    model, batch = Recorded(), make_batch(make_data(**others), num_valid)
    task = checked_task(model, batch)
    model.calls.clear()
    before = batch.data["tokens"].clone(), others.get("targets", torch.empty(0)).clone()
    by_model, by_logits = task.loss(model, batch), CausalLM().loss(model.inner, batch)
    (_, asked, answer) = model.calls[0]
    assert answer.shape == ()
    assert (asked[num_valid:] == -100).all()
    assert by_model.count == by_logits.count == (asked != -100).sum()
    assert by_model.total.item() == pytest.approx(by_logits.total.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(r.total, list(model.parameters())) for r in (by_model, by_logits))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)
    assert torch.equal(before[0], batch.data["tokens"])  # fillers are marked in a copy
    assert torch.equal(before[1], others.get("targets", torch.empty(0)))


def test_check_asks_such_a_model_for_the_logits_of_one_token_only():
    model = Recorded()
    task = checked_task(model, make_batch(make_data(documents=DOCUMENTS)))
    assert [answer.shape for _, _, answer in model.calls] == [(), (1, 1, VOCAB)]
    assert model.calls[0][0].shape == (4, 6)  # all of it fits
    data = make_data()
    data["tokens"][2, 6] = VOCAB
    with pytest.raises(DataError, match=f"token {VOCAB} of sample 20 of the dataset is outside"):
        task.loss(model, make_batch(data))


def test_a_wrapper_that_hides_the_arguments_of_forward_changes_nothing():
    class Wrapper(nn.Module):  # as DistributedDataParallel's and DeepSpeed's
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
            return self.module(*inputs, **named)

    model, batch = Recorded(), make_batch(make_data())
    task = checked_task(model, batch)
    model.calls.clear()
    task.loss(Wrapper(model), batch)
    assert [answer.shape for _, _, answer in model.calls] == [()]
    model.calls.clear()
    checked_task(Wrapper(model), batch).loss(Wrapper(model), batch)  # takes any keyword, which says nothing
    assert model.calls[-1][2].shape == (4, 6, VOCAB)


def test_a_sum_that_is_none():
    class Mean(nn.Module):
        def forward(self, tokens: Tensor, sum_cross_entropy_of: Tensor | None = None) -> Tensor:
            return torch.zeros(*tokens.shape) if sum_cross_entropy_of is not None else torch.zeros(*tokens.shape, VOCAB)

    with pytest.raises(ModelError, match=r"returns float32\[4, 6\] when it is asked for a sum"):
        CausalLM().check(Mean(), make_batch(make_data()))


# ----------------------------------------------------------------------------------------------------- check


def test_check_accepts_what_fits():
    for data in (make_data(), make_data(documents=DOCUMENTS), make_data(targets=torch.full((4, 6), -100))):
        CausalLM().check(make_model(), make_batch(data))
        CausalLM().check(make_model().to("meta"), make_batch(data))


@pytest.mark.parametrize("token", [VOCAB, -1])
@pytest.mark.parametrize("place", [(2, 0), (2, 6)])  # an input, and a token that is only a target
def test_a_token_outside_the_vocabulary_is_named(token, place):
    task, model, data = CausalLM(), make_model(), make_data()
    task.check(model, make_batch(make_data()))
    data["tokens"][place] = token
    for refuse in (task.loss, task.check):
        with pytest.raises(DataError, match=f"token {token} of sample 20 of the dataset is outside"):
            refuse(model, make_batch(data))


def test_a_token_outside_the_vocabulary_poisons_the_loss_where_nobody_may_look():
    task, model, data = CausalLM(), make_model(), make_data()
    batch = make_batch(data)
    assert task._guarded_sums(model, data["tokens"], batch, VOCAB).total == task.loss(model, batch).total
    data["tokens"][2, 3] = VOCAB
    assert math.isnan(task._guarded_sums(model, data["tokens"], batch, VOCAB).total.item())


def test_a_model_that_cannot_keep_documents_apart():
    class Plain(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, VOCAB)

    CausalLM().check(Plain(), make_batch(make_data()))
    with pytest.raises(CombinationError, match=r"Plain\.forward takes no `documents`"):
        CausalLM().check(Plain(), make_batch(make_data(documents=DOCUMENTS)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((torch.zeros(4, 3), torch.zeros(4)), "the data give (float32[4, 3], float32[4])"),
        ({"ids": torch.zeros(4, 7).long()}, "the data give {ids: int64[4, 7]}"),
        ({"tokens": torch.zeros(4, 7)}, "the data give {tokens: float32[4, 7]}"),
        ({"tokens": torch.zeros(4, 1).long()}, "the data give {tokens: int64[4, 1]}"),
        (make_data(documents=DOCUMENTS[:, 1:]), "documents is int64[4, 6], not of shape [4, 7]"),
        (make_data(targets=DOCUMENTS), "targets is int64[4, 7], not of shape [4, 6]"),
        ({"tokens": torch.zeros(4, 8).long()}, "7 tokens reach a model with a context of 6"),
    ],
)
def test_check_refuses_data(data, said):
    with pytest.raises((DataError, ModelError)) as caught:
        CausalLM().check(make_model(), make_batch(data))
    assert said in str(caught.value)


def test_outputs_that_are_not_logits_for_each_token():
    class Last(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(len(tokens), VOCAB)

    for refuse in (CausalLM().check, CausalLM().loss):
        with pytest.raises(ModelError, match=r"the model returns float32\[4, 11\]"):
            refuse(Last(), make_batch(make_data()))


def test_build_by_name():
    assert isinstance(tasks.build("causal_lm"), CausalLM)
