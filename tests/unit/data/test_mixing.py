"""Mixup and CutMix: by hand, against torchvision's own, and the same however a step is cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import bigtrain
from bigtrain.config.loader import from_dict
from bigtrain.data import Mixed, Mixing, TrainLoader, combine
from bigtrain.errors import CombinationError, ConfigError, DataError
from bigtrain.protocols import Batch
from bigtrain.tasks.classification import Classification

SAMPLES, BATCH = 23, 10


class Pictures:
    """Numbered pictures with a pattern of their own."""

    is_random = False
    images = torch.rand(SAMPLES, 3, 12, 9, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index % 4


def steps(
    count: int, mixing: Mixing, *, world_size: int = 1, transforms=(), **options
) -> list[dict[str, torch.Tensor]]:
    """The global batch of each step, put together from all ranks; without what only fills up."""
    data = combine(Pictures(), train_transforms=transforms).train
    of_ranks = []
    for rank in range(world_size):
        loader = TrainLoader(data, batch_size=BATCH, rank=rank, world_size=world_size, seed=5, mixing=mixing, **options)
        of_ranks.append([step for step, _ in zip(loader.steps(), range(count), strict=False)])
        loader.close()
    found = []
    for parts in zip(*of_ranks, strict=True):
        batches = [batch for part in parts for batch in part.microbatches]
        assert all(isinstance(batch.data, Mixed) for batch in batches)
        whole = [torch.cat([batch.data[i][: batch.num_valid] for batch in batches]) for i in range(4)]
        indices = [index for batch in batches for index in batch.indices[: batch.num_valid]]
        found.append({**dict(zip(Mixed._fields, whole, strict=True)), "indices": torch.tensor(indices)})
    return found


BOTH = Mixing(mixup=0.4, cutmix=1.0, share=0.9, seed=5)


def test_a_sample_is_mixed_with_the_one_before_it_in_the_global_batch():
    for step in steps(4, Mixing(mixup=0.4, cutmix=0.0, share=1.0, seed=5)):
        own, before = Pictures.images[step["indices"]], Pictures.images[step["indices"].roll(1)]
        shares = step["shares"].view(-1, 1, 1, 1)
        assert torch.equal(step["inputs"], own * shares + before * (1 - shares))
        assert torch.equal(step["labels"], step["indices"] % 4)
        assert torch.equal(step["partners"], step["indices"].roll(1) % 4)
        assert len(set(step["shares"].tolist())) == len(step["shares"])  # each its own


@pytest.mark.parametrize("cut", [
    {"world_size": 2}, {"world_size": 3, "micro_batch_size": 2}, {"world_size": 7}, {"micro_batch_size": 3},
    {"world_size": 3, "micro_batch_size": 3, "static_shapes": True}, {"workers": 2}, {"world_size": 12},
])  # fmt: skip
def test_the_same_however_a_step_is_cut(cut):
    ours, whole = steps(5, BOTH, **cut), steps(5, BOTH)  # the third has three samples, and the fourth is the next epoch
    assert [len(step["indices"]) for step in whole] == [10, 10, 3, 10, 10]
    for mine, expected in zip(ours, whole, strict=True):
        assert all(torch.equal(mine[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_it_is_torchvisions_arithmetic(monkeypatch, kind):
    """torchvision draws one share for the whole batch: it is made to draw ours."""
    images, labels = Pictures.images[:6], torch.arange(6) % 4
    rolled = (torch.cat((images[-1:], images)), torch.cat((labels[-1:], labels)))
    ours = Mixing(**{"mixup": 0.0, "cutmix": 0.0, kind: 1.0}, share=1.0, seed=1)(0, [7] * 6, rolled)
    draw = np.random.RandomState(_word(1, 0, 7))
    draw.random_sample(2)
    share, place = float(draw.beta(1.0, 1.0)), iter([draw.randint(9), draw.randint(12)])
    theirs = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](num_classes=4)
    theirs._dist = type("Fixed", (), {"sample": lambda self, size: torch.tensor([share])})()
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.tensor([next(place)]))
    mixed, targets = theirs(images, labels)
    torch.testing.assert_close(ours.inputs, mixed)
    one, other = (F.one_hot(part, 4).float() for part in (ours.labels, ours.partners))
    torch.testing.assert_close(one * ours.shares[:, None] + other * (1 - ours.shares[:, None]), targets)


def _word(seed: int, epoch: int, index: int) -> int:
    from bigtrain.data import mixing
    from bigtrain.data.order import mix

    return mix(mixing._STREAM, seed, epoch, index) & 0xFFFF_FFFF


def test_shares_are_drawn_as_asked():
    images, labels = torch.zeros(3001, 1, 8, 8), torch.zeros(3001, dtype=torch.int64)
    shares = Mixing(mixup=0.4, cutmix=0.0, share=0.75, seed=0)(0, range(3000), (images, labels)).shares
    untouched = shares == 1
    assert 0.22 < untouched.float().mean() < 0.28
    drawn = shares[~untouched]
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.06)  # of Beta(a, a)
    cut = Mixing(mixup=0.0, cutmix=1.0, share=1.0, seed=0)(1, range(3000), (images, labels)).shares
    assert cut.min() == 1 - 36 / 64  # half a side is below 4, so at most 3, as torchvision rounds it
    assert cut.max() == 1
    both = Mixing(mixup=0.4, cutmix=1.0, share=1.0, seed=0)
    kinds = sum(both._choose(0, index, (8, 8)).box is not None for index in range(2000))
    assert 900 < kinds < 1100


def test_reading_mixed_samples_leaves_other_random_numbers_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    steps(2, BOTH)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("arguments", [
    {}, {"class_weights": [1.0, 2.0, 0.5, 3.0]}, {"label_smoothing": 0.1},
    {"ignore_index": 2, "class_weights": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.2},
])  # fmt: skip
def test_the_loss_is_that_of_both_labels(arguments):
    mixed = BOTH(0, list(range(8)), (torch.rand(9, 3, 8, 8), torch.tensor([0, 1, 2, 3, 2, 1, 0, 3, 1])))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    batch = Batch(mixed, (torch.arange(8) < 7).float(), 7)
    task = Classification(**arguments)
    found = task.loss(model, batch)
    total = count = 0.0
    logits = model(mixed.inputs).double()
    for place in range(7):
        for labels, share in ((mixed.labels, mixed.shares[place]), (mixed.partners, 1 - mixed.shares[place])):
            one = Batch((mixed.inputs[place : place + 1], labels[place : place + 1]), torch.ones(1), 1)
            alone = task.loss(lambda x, place=place: logits[place : place + 1], one)
            total += float(share) * float(alone.total.detach())
            count += float(share) * float(alone.count)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(found.count) == pytest.approx(count, rel=1e-5)


def test_a_label_outside_the_classes_is_named():
    mixed = BOTH(0, [4, 5], (torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 9])))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    with pytest.raises(DataError, match="label 9 of sample 5"):
        Classification().loss(model, Batch(mixed, torch.ones(2), 2, [4, 5]))


VALUES = {
    "run": {"name": "run"},
    "task": "classification",
    "model": "simple_cnn",
    "data": {"name": "digits", "batch_size": 64, "mix": {"mixup": 0.2}},
    "train": {"steps": 2},
}


def test_what_cannot_be_mixed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mixes nothing"):
        from_dict({**VALUES, "data": {"name": "digits", "mix": {"share": 0.5}}})
    for task in ("regression", {"name": "tests.helpers.scripted:Scripted", "args": {"scores": []}}):
        with pytest.raises(CombinationError, match="does not take mixtures"):
            bigtrain.train({**VALUES, "task": task, "run": {"dir": str(tmp_path)}})
    vectors = {"kind": "classification", "shape": [5]}
    rows = {**VALUES, "data": {"name": "synthetic", "args": vectors, "mix": {"cutmix": 1.0}}}
    rows["model"] = {"name": "torch.nn:Linear", "args": {"in_features": 5, "out_features": 10}}
    with pytest.raises(DataError, match="CutMix cuts images"):
        bigtrain.train({**rows, "run": {"dir": str(tmp_path)}})
    rows["data"]["mix"] = {"mixup": 0.2}
    bigtrain.train({**rows, "run": {"dir": str(tmp_path), "name": "vectors"}, "track": {"progress": "none"}})


def test_randaugment_is_the_same_however_a_step_is_cut():
    """torchvision's own, drawn by (seed, epoch, index) like all augmentation."""
    wanted = from_dict({**VALUES, "data": {"name": "digits", "transforms": {"train": [
        {"name": "RandAugment", "args": {"num_ops": 2, "magnitude": 9}}, "RandomHorizontalFlip"]}}}).config  # fmt: skip
    transforms = wanted.data.transforms.train
    whole = steps(4, BOTH, transforms=transforms)
    assert not torch.equal(whole[0]["inputs"], steps(4, BOTH)[0]["inputs"])
    for cut in ({"world_size": 3, "micro_batch_size": 2}, {"workers": 2}):
        for mine, expected in zip(steps(4, BOTH, transforms=transforms, **cut), whole, strict=True):
            assert all(torch.equal(mine[key], expected[key]) for key in expected)
