"""Classification: sums against torch's own means, scores against torchmetrics and scikit-learn."""

import math
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from bigtrain import tasks
from bigtrain.errors import DataError, ModelError, UserError
from bigtrain.protocols import Batch
from bigtrain.tasks import scores as scoring
from bigtrain.tasks.classification import Classification

CLASSES = 5
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def make_batch(inputs: Tensor, labels: Tensor, num_valid: int | None = None) -> Batch:
    valid = len(labels) if num_valid is None else num_valid
    weight = (torch.arange(len(labels)) < valid).float()
    return Batch((inputs, labels), weight, valid, indices=range(100, 100 + len(labels)))


def logits_and_labels(n: int = 23, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


# ------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignored", [None, 3, -100])
@pytest.mark.parametrize("guarded", [False, True])
def test_total_over_count_is_torchs_mean(smoothing, weights, ignored, guarded):
    logits, labels = logits_and_labels()
    if ignored == -100:
        labels[4:7] = -100
    args = {"label_smoothing": smoothing, "class_weights": weights, "ignore_index": ignored}
    task = tasks.build("classification", args)
    logits.requires_grad_()
    if guarded:  # what other devices than the CPU go through
        total, count = task._guarded_sums(logits, labels)
    else:
        total, count, *_ = task.loss(nn.Identity(), make_batch(logits, labels))
    expected = F.cross_entropy(
        logits,
        labels,
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
        ignore_index=-1 if ignored is None else ignored,
    )
    torch.testing.assert_close(total / count, expected, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(total / count, logits)
    (want,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_samples_of_weight_0_count_nowhere():
    logits, labels = logits_and_labels()
    full = Classification().loss(nn.Identity(), make_batch(logits[:20], labels[:20]))
    logits.requires_grad_()
    padded = Classification().loss(nn.Identity(), make_batch(logits, labels, num_valid=20))
    assert torch.equal(padded.total, full.total)
    assert padded.count == full.count == 20
    (gradient,) = torch.autograd.grad(padded.total, logits)
    assert gradient[:20].any(dim=1).all()
    assert not gradient[20:].any()


def test_a_microbatch_that_only_fills_up_has_a_gradient_of_zero():
    logits, labels = logits_and_labels(3)
    logits.requires_grad_()
    result = Classification(class_weights=WEIGHTS).loss(nn.Identity(), make_batch(logits, labels, num_valid=0))
    assert result.total == 0
    assert result.count == 0
    (gradient,) = torch.autograd.grad(result.total, logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_at_least_float32(dtype):
    logits, labels = logits_and_labels()
    result = Classification(class_weights=WEIGHTS).loss(nn.Identity(), make_batch(logits.to(dtype), labels))
    assert result.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(logits.to(dtype).double(), labels, weight=weight, reduction="sum")
    torch.testing.assert_close(result.total.double(), expected, rtol=1e-5, atol=0)


def test_labels_of_other_integer_types():
    logits, labels = logits_and_labels()
    expected = Classification().loss(nn.Identity(), make_batch(logits, labels)).total
    for dtype in (torch.uint8, torch.int32, torch.uint16, torch.uint32):
        batch = make_batch(logits, labels.to(dtype))
        Classification().check(nn.Identity(), batch)
        assert Classification().loss(nn.Identity(), batch).total == expected


@pytest.mark.parametrize("label", [-1, -100, CLASSES, 255])
def test_a_label_outside_the_classes_is_named(label):
    logits, labels = logits_and_labels()
    labels[7] = label
    with pytest.raises(DataError) as caught:
        Classification().loss(nn.Identity(), make_batch(logits, labels))
    assert f"label {label} of sample 107 of the dataset" in caught.value.problem
    assert "5 classes 0 to 4" in caught.value.problem


def test_a_label_outside_the_classes_poisons_the_loss_where_nobody_may_look():
    logits, labels = logits_and_labels()
    good, count = Classification()._guarded_sums(logits, labels)
    assert good == F.cross_entropy(logits, labels, reduction="sum")
    for label in (-1, CLASSES, 10**12):
        labels[7] = label
        total, count = Classification()._guarded_sums(logits, labels)
        assert math.isnan(total.item())
        assert count == len(labels)


def test_answers_with_more_than_logits():
    logits, labels = logits_and_labels()
    answer = namedtuple("answer", "logits aux")

    class Model(nn.Module):
        def __init__(self, aux: Tensor | None) -> None:
            super().__init__()
            self.aux = aux

        def forward(self, x: Tensor) -> object:
            return answer(x, self.aux)

    batch = make_batch(logits, labels)
    assert Classification().loss(Model(None), batch).total == Classification().loss(nn.Identity(), batch).total
    with pytest.raises(ModelError, match=r"returns \(float64\[23, 5\], float64\[1\]\), not one tensor"):
        Classification().loss(Model(torch.zeros(1, dtype=torch.float64)), batch)


def test_outputs_that_are_not_logits():
    logits, labels = logits_and_labels()
    for inputs in (logits[:, :, None], logits[:9], logits[:, 0]):
        with pytest.raises(ModelError, match=r"for targets int64\[23\]"):
            Classification().loss(nn.Identity(), make_batch(inputs, labels))


# --------------------------------------------------------------------------------------------------- metrics


def evaluate(task: Classification, logits: Tensor, labels: Tensor, size: int = 7) -> dict[str, object]:
    metrics = task.metrics()
    for start in range(0, len(labels), size):
        batch = make_batch(logits[start : start + size], labels[start : start + size])
        metrics.update(task.loss(nn.Identity(), batch), batch)
    return metrics.compute()


@pytest.mark.parametrize("classes", [2, CLASSES, 40])
def test_scores_are_torchmetrics(classes):
    logits, labels = logits_and_labels(61, classes)  # with 40 classes some are never seen
    scores = evaluate(Classification(), logits, labels)
    references = {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "precision": MulticlassPrecision(classes),
        "recall": MulticlassRecall(classes),
        "f1": MulticlassF1Score(classes),
    }
    for name, metric in references.items():
        metric.update(logits, labels)
        assert scores[name] == pytest.approx(metric.compute().item(), rel=1e-6), name
    matrix = MulticlassConfusionMatrix(classes)
    matrix.update(logits, labels)
    assert torch.equal(scores["confusion_matrix"], matrix.compute())


def test_scores_are_scikit_learns():
    logits, labels = logits_and_labels(61)
    scores = evaluate(Classification(), logits, labels)
    predicted = logits.argmax(1)
    for name, score in [("precision", precision_score), ("recall", recall_score), ("f1", f1_score)]:
        assert scores[name] == pytest.approx(score(labels, predicted, average="macro"), rel=1e-14)
    by_class = recall_score(labels, predicted, average=None)
    assert scores["recall_per_class"].tolist() == pytest.approx(by_class.tolist(), rel=1e-14)


def test_scores_written_out():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 0, 1, 1, 0, 2])  # class 4 is never seen, 2 never a label, 3 never predicted
    scores = evaluate(Classification(), F.one_hot(predicted, 5).double(), labels)
    assert scores["accuracy"] == 3 / 6
    assert scores["precision"] == (2 / 3 + 1 / 2 + 0 + 0) / 4
    assert scores["recall"] == (2 / 3 + 1 / 2 + 0 + 0) / 4
    assert scores["f1"] == (2 / 3 + 1 / 2 + 0 + 0) / 4
    assert scores["confusion_matrix"].tolist() == [
        [2, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    recall = scores["recall_per_class"].tolist()
    assert recall[:2] + recall[3:4] == [2 / 3, 1 / 2, 0]
    assert math.isnan(recall[2])
    assert math.isnan(recall[4])


def test_very_many_classes_are_counted_without_a_matrix(monkeypatch):
    logits, labels = logits_and_labels(61, 40)
    expected = evaluate(Classification(), logits, labels)
    monkeypatch.setattr(scoring, "_MATRIX_CLASSES", 39)
    scores = evaluate(Classification(), logits, labels)
    assert "confusion_matrix" in expected
    assert "confusion_matrix" not in scores
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name], rtol=0, atol=0, equal_nan=True)


def test_padding_and_ignored_labels_count_in_no_score():
    logits, labels = logits_and_labels(30)
    task = Classification(ignore_index=3)
    labels[:5] = 3
    keep = labels != 3
    expected = evaluate(Classification(), logits[keep], labels[keep])
    metrics = task.metrics()
    batch = make_batch(logits, labels)
    metrics.update(task.loss(nn.Identity(), batch), batch)
    twice = torch.cat([logits, logits[-1:].repeat(4, 1)]), torch.cat([labels, labels[-1:].repeat(4)])
    padded = task.metrics()
    batch = make_batch(*twice, num_valid=30)
    padded.update(task.loss(nn.Identity(), batch), batch)
    for accumulator in (metrics, padded):
        scores = accumulator.compute()
        for name, value in expected.items():
            torch.testing.assert_close(scores[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_label_outside_the_classes_that_no_loss_could_look_at_is_named_with_the_scores():
    logits, labels = logits_and_labels()
    task = Classification()
    metrics = task.metrics()
    for start, foreign in ((0, 1), (7, -3)):
        batch = make_batch(logits[start : start + 7], labels[start : start + 7])
        batch = replace(batch, indices=range(100 + start, 107 + start))
        result = task.loss(nn.Identity(), batch)  # as a GPU's loss, it tells nothing of the label
        metrics.update(result._replace(target=result.target.index_fill(0, torch.tensor(2), foreign)), batch)
    with pytest.raises(DataError, match="label -3 of sample 109 of the dataset is none of the 5 classes"):
        metrics.compute()


def test_scores_can_be_asked_for_between_updates():
    logits, labels = logits_and_labels(30)
    task = Classification()
    metrics = task.metrics()
    for end in (13, 30):
        start = 0 if end == 13 else 13
        batch = make_batch(logits[start:end], labels[start:end])
        metrics.update(task.loss(nn.Identity(), batch), batch)
        assert metrics.compute()["accuracy"] == (logits[:end].argmax(1) == labels[:end]).double().mean()


def test_one_class():
    scores = evaluate(Classification(), torch.randn(9, 1), torch.zeros(9).long())
    assert {scores[name] for name in ("accuracy", "precision", "recall", "f1")} == {1.0}
    assert scores["confusion_matrix"] == 9


def test_many_classes_cost_no_matrix_of_them():
    """Of 300,000 × 300,000 counts it would take 720 GB."""
    classes = 300_000
    predicted, labels = torch.tensor([7, 7, 299_999]), torch.tensor([7, 8, 299_999])
    scores = evaluate(Classification(), F.one_hot(predicted, classes).float(), labels)
    assert (scores["accuracy"], scores["precision"], scores["recall"]) == (2 / 3, (1 / 2 + 1) / 3, 2 / 3)
    assert "confusion_matrix" not in scores


@pytest.mark.parametrize("only_warns", [False, True])
def test_deterministic_algorithms_cost_no_more(only_warns):
    # Compared cell by cell, 20,000 samples and 1,500 classes would take 360 GB.
    logits, labels = torch.eye(1500)[:400].repeat(50, 1), torch.arange(400).repeat(50)
    torch.use_deterministic_algorithms(True, warn_only=only_warns)
    try:
        scores = evaluate(Classification(), logits, labels, size=5000)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == only_warns
    finally:
        torch.use_deterministic_algorithms(False)
    assert scores["f1"] == 1
    assert torch.equal(scores["confusion_matrix"].diagonal()[:401], torch.tensor([50] * 400 + [0]))


def test_an_evaluation_without_samples():
    logits, labels = logits_and_labels(4)
    assert Classification().metrics().compute() == {}
    task = Classification(num_classes=CLASSES)
    for metrics in (task.metrics(), Classification().metrics()):
        if metrics._size == 0:
            batch = make_batch(logits, labels, num_valid=0)
            metrics.update(task.loss(nn.Identity(), batch), batch)
        scores = metrics.compute()
        assert scores["recall_per_class"].isnan().all()
        assert torch.equal(scores["confusion_matrix"], torch.zeros(CLASSES, CLASSES, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------- check


class Net(nn.Module):
    """A batch norm and dropout, which a check must not touch."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3, outputs)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.drop(self.norm(x))) + 0 * torch.rand(())
        return out


def check(task: Classification, model: nn.Module, inputs: object, labels: object) -> None:
    task.check(model, Batch((inputs, labels), torch.ones(6), 6, indices=range(6)))


def test_check_leaves_nothing_behind():
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    check(Classification(), model, torch.randn(6, 3), torch.arange(6) % CLASSES)
    after = torch.rand(())
    torch.manual_seed(0)
    torch.randn(6, 3)
    assert after == torch.rand(())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_check_takes_models_on_the_meta_device_and_in_other_dtypes():
    labels = torch.arange(6) % CLASSES
    for model in (Net().to("meta"), Net().double()):
        check(Classification(num_classes=CLASSES), model, torch.randn(6, 3), labels)
        with pytest.raises(DataError, match="label 5 of sample 2"):
            check(Classification(), model, torch.randn(6, 3), torch.tensor([0, 1, 5, 2, 3, 4]))


@pytest.mark.parametrize(
    ("task", "inputs", "labels", "error", "said"),
    [
        ({}, torch.zeros(6, 4), torch.zeros(6).long(), DataError, "inputs: float32[6, 4]"),
        ({}, torch.zeros(6, 3), torch.zeros(6), DataError, "labels are float32[6]"),
        ({}, torch.zeros(6, 3), torch.zeros(6, 1).long(), DataError, "labels are int64[6, 1]"),
        ({}, torch.zeros(6, 3), torch.zeros(5).long(), DataError, "a batch of 6 samples"),
        ({}, torch.zeros(6, 3), [0] * 6, DataError, "this task needs pairs (input, label)"),
        ({}, torch.zeros(6, 3), torch.full((6,), -100), DataError, "label -100 of sample 0"),
        ({"num_classes": 7}, torch.zeros(6, 3), torch.zeros(6).long(), ModelError, "5 outputs for 7 classes"),
        (
            {"class_weights": [1, 2]},
            torch.zeros(6, 3),
            torch.zeros(6).long(),
            UserError,
            "2 class weights for 5",
        ),
    ],
)
def test_check_refuses(task, inputs, labels, error, said):
    with pytest.raises(error) as caught:
        check(Classification(**task), Net(), inputs, labels)
    assert said in str(caught.value)


def test_check_refuses_other_data_and_other_outputs():
    with pytest.raises(DataError, match=r"the data give float32\[6, 3\]"):
        Classification().check(Net(), Batch(torch.zeros(6, 3), torch.ones(6), 6))
    with pytest.raises(ModelError, match=r"returns float32\[6, 1, 3\]"):
        check(Classification(), nn.Unflatten(1, (1, 3)), torch.zeros(6, 3), torch.zeros(6).long())


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": "some"}, "label_smoothing"),
        ({"num_classes": 0}, "num_classes"),
        ({"class_weights": [1.0, -1.0]}, "class_weights"),
        ({"class_weights": ["heavy"]}, "class_weights"),
        ({"class_weights": 3.0}, "class_weights"),
    ],
)
def test_arguments_that_cannot_be_meant(args, where):
    with pytest.raises(UserError) as caught:
        tasks.build("classification", args)
    assert caught.value.where == f"task.args.{where}"
    assert caught.value.exit_code == 2
