"""Metrics over ranks are those of one process: counts to the last one, all else to 1e-12."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import AUROC

from bigtrain import tasks
from bigtrain.data import EvalLoader
from bigtrain.dist import World
from bigtrain.errors import UserError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.measured import Doubts, metrics_of, sum_over_ranks
from tests.helpers.distributed import run_distributed

SAMPLES, RANKS, MICRO, CLASSES = 1012, 8, 32, 13


def make_samples(name: str) -> tuple[Tensor, Tensor]:
    """All predictions and targets, in float32, as a model would give them."""
    generator = torch.Generator().manual_seed(0)
    if name == "regression":
        targets = torch.randn(SAMPLES, 2, generator=generator) + 10
        return targets + torch.randn(SAMPLES, 2, generator=generator), targets
    logits = torch.randn(SAMPLES, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES - 1, (SAMPLES,), generator=generator)  # one class is never a label


def share(rank: int, ranks: int) -> range:
    """A contiguous, nearly equal part of the samples; the last rank gets none, to make it hard."""
    ranks = max(ranks - 1, 1)
    if rank >= ranks:
        return range(SAMPLES, SAMPLES)
    each, more = divmod(SAMPLES, ranks)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def microbatches(name: str, rank: int, ranks: int) -> list[Batch]:
    """A rank's part, in as many microbatches as every rank makes, the last filled up with weight 0."""
    inputs, targets = make_samples(name)
    indices = list(share(rank, ranks))
    batches = []
    for start in range(0, -(-len(share(0, ranks)) // MICRO) * MICRO, MICRO):
        part = indices[start : start + MICRO]
        filled = (part + [indices[-1] if indices else 0] * MICRO)[:MICRO]
        weight = (torch.arange(MICRO) < len(part)).float()
        batches.append(Batch((inputs[filled], targets[filled]), weight, len(part), filled))
    return batches


def evaluate(name: str, rank: int, ranks: int) -> dict[str, Any]:
    task = tasks.build(name)
    metrics = task.metrics()
    for batch in microbatches(name, rank, ranks):
        metrics.update(task.loss(nn.Identity(), batch), batch)
    return plain(metrics.compute())


def plain(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores as numbers and lists, which travel between processes without shared memory."""
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in scores.items()}


def evaluate_language_model(rank: int, ranks: int) -> dict[str, Any]:
    """Each sample stands for a sequence: its loss and its number of tokens are given."""
    metrics = tasks.build("causal_lm").metrics()
    losses = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0)) * 50
    for index in share(rank, ranks):
        batch = Batch({}, torch.ones(1), 1)
        metrics.update(LossSum(losses[index], torch.tensor(index % 7)), batch)
    return metrics.compute()


def on_one_rank() -> tuple[dict[str, Any], ...]:
    """Everything in one spawn; a rank that never updates learns the sizes from the others."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    nothing = tasks.build("classification").metrics()
    if rank == 0:
        batch = microbatches("classification", 0, ranks)[0]
        nothing.update(tasks.build("classification").loss(nn.Identity(), batch), batch)
    return (
        evaluate("classification", rank, ranks),
        evaluate("regression", rank, ranks),
        evaluate_language_model(rank, ranks),
        plain(nothing.compute()),
        tasks.build("regression").metrics().compute(),
    )


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name in ("confusion_matrix", "tokens"):
            assert value == b[name]
        else:
            assert value == pytest.approx(b[name], rel=1e-12, nan_ok=True), name


def test_eight_ranks_give_what_one_process_gives():
    alone = evaluate("classification", 0, 1), evaluate("regression", 0, 1), evaluate_language_model(0, 1)
    assert sum(map(sum, alone[0]["confusion_matrix"])) == SAMPLES
    assert not any(math.isnan(alone[0][name]) for name in ("accuracy", "precision", "recall", "f1"))
    first = microbatches("classification", 0, RANKS)[0]
    task = tasks.build("classification")
    only_first = task.metrics()
    only_first.update(task.loss(nn.Identity(), first), first)
    expected = (*alone, plain(only_first.compute()), {})
    for results in run_distributed(on_one_rank, RANKS):
        for got, want in zip(results, expected, strict=True):
            assert_same(got, want)


def doubtful(ranks: int) -> tuple[list[str], list[str], list[str], float]:
    """What is said of metrics that this rank has for itself alone, and again; and of those it shares."""
    rank = dist.get_rank()
    doubts = Doubts(World(rank, ranks))
    own = {"loss": 1.0, "iou": 0.5 + rank / 10, "same": 0.25, "matrix": torch.ones(2, 2)}
    total = sum_over_ranks(torch.tensor(float(rank)))
    return doubts.about(own), doubts.about(own), Doubts(World(rank, ranks)).about({"loss": total.item()}), total.item()


def test_metrics_that_ranks_do_not_share_are_doubted_once():
    for told, again, shared, total in run_distributed(doubtful, 2, 2):
        (text,) = told
        assert text.startswith("the metric iou is 0.5 on rank 0 and 0.6 on rank 1")
        assert (again, shared, total) == ([], [], 1.0)


class OfTorchmetrics(Classification):
    """Measured by a metric that keeps what it was given, and cannot take nothing."""

    def metrics(self) -> Any:
        return AUROC("multiclass", num_classes=2)


def auroc(samples: int, ranks: int) -> Any:
    """Of samples that are cut into batches of four; in several processes one of them has none of the last."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(samples, 2, generator=generator), torch.arange(samples) % 2
    task = OfTorchmetrics()
    metrics = metrics_of(task)
    dataset = [*zip(inputs, labels, strict=True)]
    for batch in EvalLoader(dataset, batch_size=4, rank=dist.get_rank() if ranks > 1 else 0, world_size=ranks):  # type: ignore[arg-type]
        metrics.update(task.loss(nn.Identity(), batch), batch)
    try:
        return metrics.compute()["multiclass_auroc"].item()
    except UserError as error:
        return error.problem


def test_a_metric_of_torchmetrics_where_a_rank_has_none_of_the_samples():
    alone = auroc(9, 1)
    assert 0 < alone < 1
    assert run_distributed(auroc, 2, 9, 2) == pytest.approx([alone] * 2)
    refused = run_distributed(auroc, 2, 1, 2)
    assert all("fewer samples to evaluate on than processes" in said for said in refused)
