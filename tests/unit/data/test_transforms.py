"""Transforms by name: what they do, that they are reproducible, and what is refused."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bigtrain.data import TrainLoader, build, combine
from bigtrain.data.transforms import Transformed
from bigtrain.errors import DataError

# Python 3.12 and later warn of what torch's DataLoader does on Linux: fork in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


def named(name, **args):
    return SimpleNamespace(name=name, args=args)


class Pictures:
    """Pillow images of random pixels, with labels."""

    is_random = False

    def __len__(self):
        return 11

    def __getitem__(self, index):
        pixels = np.random.RandomState(index).randint(0, 256, (8, 9, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


def image(*transforms):
    return Transformed(Pictures(), transforms, where="data.transforms.train")[3][0]


def pixels():
    return torch.from_numpy(np.array(Pictures()[3][0])).permute(2, 0, 1)


def test_without_transforms_an_image_becomes_floats_from_0_to_1():
    torch.testing.assert_close(image(), pixels() / 255)


def test_transforms_are_applied_in_their_order():
    found = image(
        named("CenterCrop", size=[4, 4]),
        named("ToDtype", dtype="float32", scale=True),
        named("Normalize", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
    )
    torch.testing.assert_close(found, (pixels()[:, 2:6, 2:6] / 255 - 0.5) / 0.25)
    assert type(found) is torch.Tensor


def test_words_stand_for_what_a_run_file_cannot_hold():
    resize = image(named("Resize", size=[4, 4], interpolation="nearest"))
    expected = v2.functional.resize(pixels(), [4, 4], interpolation=v2.InterpolationMode.NEAREST)
    torch.testing.assert_close(resize, expected / 255)
    assert image(named("AutoAugment", policy="cifar10")).shape == (3, 8, 9)


def test_transforms_may_hold_transforms():
    never = named("RandomApply", transforms=[{"name": "Resize", "args": {"size": [2, 2]}}, "RandomGrayscale"], p=0.0)
    torch.testing.assert_close(image(never), pixels() / 255)


def test_labels_and_the_base_stay_as_they_are():
    dataset = Transformed(Pictures(), [named("Resize", size=[2, 2])], where="data.transforms.train")
    assert len(dataset) == 11
    assert dataset[5][1] == 5


def test_tensors_are_transformed_too():
    sets = build("digits", train_transforms=[named("RandomErasing", p=1.0, value=7)])
    plain = build("digits")
    (batch,) = next(TrainLoader(sets.train, batch_size=32).steps()).microbatches
    for found, index in zip(batch.data[0], batch.indices, strict=True):
        kept = found != 7
        assert not kept.all()
        assert torch.equal(found[kept], plain.train[index][0][kept])


@pytest.mark.parametrize(
    ("transforms", "is_random"),
    [([], False), (["Resize"], False), (["RandomCrop"], True), (["Resize", "ColorJitter"], True)],
)
def test_random_transforms_are_known(transforms, is_random):
    args = {"Resize": {"size": [4, 4]}, "RandomCrop": {"size": 4}, "ColorJitter": {}}
    dataset = Transformed(Pictures(), [named(name, **args[name]) for name in transforms], where="data.transforms.train")
    assert dataset.is_random is is_random


def test_augmentation_is_the_same_for_any_number_of_workers_and_batches():
    crops = [
        named("RandomResizedCrop", size=[5, 5]),
        named("RandomHorizontalFlip"),
        named("ColorJitter", brightness=0.5),
    ]
    dataset = combine(Pictures(), train_transforms=crops).train

    def by_sample(workers, batch_size):
        loader = TrainLoader(dataset, batch_size=batch_size, seed=2, workers=workers)
        found = {}
        for step in islice(loader.steps(), 2 * loader.steps_per_epoch):
            for row, index in enumerate(step.microbatches[0].indices):
                found[step.epoch, index] = step.microbatches[0].data[0][row]
        loader.close()
        return found

    reference = by_sample(0, 4)
    assert len(reference) == 22
    for workers, batch_size in [(0, 11), (1, 4), (2, 3)]:
        other = by_sample(workers, batch_size)
        assert all(torch.equal(other[key], reference[key]) for key in reference)
    assert not torch.equal(reference[0, 3], reference[1, 3])


def test_the_fingerprint_does_not_depend_on_transforms():
    plain = combine(Pictures(), 0.2)
    assert combine(Pictures(), 0.2, train_transforms=[named("RandomCrop", size=4)]).fingerprint == plain.fingerprint


def test_training_and_evaluation_have_their_own():
    sets = combine(Pictures(), 0.3, train_transforms=[named("Resize", size=[2, 2])], eval_transforms=[named("ToImage")])
    assert sets.train[0][0].shape == (3, 2, 2)
    assert sets.eval[0][0].shape == (3, 8, 9)


@pytest.mark.parametrize(
    ("transform", "problem", "remedy"),
    [
        (named("RandomHorizontalFlop"), "no transform 'RandomHorizontalFlop'", "RandomHorizontalFlip"),
        (named("Resize", sizes=[4, 4]), "no argument 'sizes'", "size"),
        (named("Resize"), "needs size", "size"),
        (named("CenterCrop", size="big"), "CenterCrop failed", "correct"),
        (named("ToDtype", dtype="float23"), "'float23' is not known", "float32"),
        (named("MixUp"), "cannot be used here", "data.mix"),
        (named("Lambda"), "cannot be used here", "dataset"),
    ],
)
def test_wrong_names_and_arguments(transform, problem, remedy):
    with pytest.raises(DataError, match=problem) as caught:
        combine(Pictures(), train_transforms=[named("ToImage"), transform])
    assert remedy in caught.value.remedy
    assert "data.transforms.train.1" in caught.value.where


def test_a_transform_that_fails_is_named():
    dataset = combine(Pictures(), train_transforms=[named("Normalize", mean=[0.5], std=[0.5])]).train
    with pytest.raises(DataError, match=r"Normalize failed on Image, \(3, 8, 9\), torch.uint8") as caught:
        next(TrainLoader(dataset, batch_size=2).steps())
    assert "ToDtype" in caught.value.remedy


def test_samples_without_an_image_are_refused():
    sets = build("synthetic", {"kind": "causal_lm"}, train_transforms=[named("RandomHorizontalFlip")])
    with pytest.raises(DataError, match="ToImage failed on dict"):
        next(TrainLoader(sets.train, batch_size=2).steps())
