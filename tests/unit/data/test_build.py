"""Data by name: what comes out, and what is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigtrain.data import EvalLoader, TrainLoader, build, combine, create
from bigtrain.errors import DataError


def named(name, **args):
    return SimpleNamespace(name=name, args=args)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's, in the current directory."""
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "def numbers(split, count=6, fail=False):\n"
        "    if fail:\n"
        "        raise RuntimeError('the disk is on strike')\n"
        "    return [torch.tensor(float(i + 100 * (split == 'eval'))) for i in range(count)]\n"
        "def alone():\n"
        "    return [torch.tensor(0.0)] * 6\n"
        "def counted(count=6, *, scale=1.0):\n"
        "    return [torch.tensor(scale)] * count\n"
        "def either(which='train', count=6):\n"
        "    return [torch.tensor(float(which == 'train'))] * count\n"
        "def nothing(split):\n"
        "    return []\n"
        "def stream(split):\n"
        "    return (number for number in range(9))\n"
        "class Stream(torch.utils.data.IterableDataset):\n"
        "    def __init__(self, split):\n"
        "        pass\n"
        "    def __len__(self):\n"
        "        return 5\n"
        "    def __iter__(self):\n"
        "        return iter(range(5))\n"
        "def unsized(split):\n"
        "    class Unsized(torch.utils.data.Dataset):\n"
        "        def __getitem__(self, index):\n"
        "            return index\n"
        "    return Unsized()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "own_data"
    sys.modules.pop("own_data", None)


# --------------------------------------------------------------------------------------------------------- one's own


def test_a_factory_of_ones_own(own_module):
    sets = build(f"{own_module}:numbers", {"count": 4}, evaluation=named(f"{own_module}:numbers"))
    (batch,) = next(TrainLoader(sets.train, batch_size=4).steps()).microbatches
    assert sorted(batch.data.tolist()) == [0.0, 1.0, 2.0, 3.0]
    assert [b.data.tolist() for b in EvalLoader(sets.eval, batch_size=6)] == [[100.0, 101, 102, 103, 104, 105]]


@pytest.mark.parametrize(
    ("factory", "args", "shown"),
    [
        ("alone", {}, "alone(split)"),
        ("counted", {}, "counted(split, count=6, scale=1.0)"),
        ("counted", {"count": 3}, "counted(split, count=6, scale=1.0)"),
    ],
)
def test_a_factory_that_takes_no_split_is_told_how_to(own_module, factory, args, shown):
    with pytest.raises(DataError, match="does not take the split as its first argument") as caught:
        build(f"{own_module}:{factory}", args, evaluation=0.5)
    assert caught.value.where == "data.name"
    assert f"def {shown};" in caught.value.remedy
    with pytest.raises(DataError, match="does not take the split") as caught:
        build(f"{own_module}:numbers", {}, evaluation=named(f"{own_module}:{factory}", **args))
    assert caught.value.where == "data.eval.name"


def test_the_split_may_be_called_otherwise(own_module):
    assert len(create(f"{own_module}:either", "eval", {"count": 3})) == 3


@pytest.mark.parametrize("factory", ["stream", "Stream", "unsized"])
def test_streams_are_refused_with_the_way_out(own_module, factory):
    with pytest.raises(DataError, match="is a stream") as caught:
        create(f"{own_module}:{factory}", "train")
    assert "bigtrain data pack" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "args", "problem"),
    [
        ("own_data:nothing", {}, "is empty"),
        ("own_data:numbers", {"counts": 3}, "no argument 'counts'"),
        ("own_data:numbers", {"split": "train"}, "split"),
        ("own_data:numbers", {"fail": True}, "the disk is on strike"),
        ("own_data:number", {}, "has no 'number'"),
        ("no_such_module:numbers", {}, "no module"),
        ("digit", {}, "there are no data 'digit'"),
        ("digits", {"sizes": 8}, "no argument 'sizes'"),
        ("text", {"context": 3}, "needs source"),
        ("csv", {}, "there are no data"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_wrong_names_and_arguments(name, args, problem):
    with pytest.raises(DataError, match=problem) as caught:
        create(name, "train", args)
    assert caught.value.where
    assert caught.value.remedy


def test_the_nearest_name_comes_first():
    with pytest.raises(DataError) as caught:
        create("image_foldr", "train")
    assert caught.value.remedy.startswith("did you mean image_folder")


# -------------------------------------------------------------------------------------------------------- evaluation


def test_a_share_is_held_out():
    sets = build("digits", {"size": 8}, evaluation=0.2)
    assert (len(sets.train), len(sets.eval)) == (1438, 359)
    indices = {
        i for loader in (sets.train, sets.eval) for batch in EvalLoader(loader, batch_size=2000) for i in batch.indices
    }
    assert indices == set(range(1797))


def test_no_evaluation():
    assert build("digits").eval is None


def test_evaluation_on_the_samples_of_training_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    args = {"source": str(tmp_path), "context": 2}
    with pytest.raises(DataError, match="would see the samples of training"):
        build("text", args, evaluation=named("text", **args))


def test_errors_of_data_for_evaluation_say_so():
    with pytest.raises(DataError) as caught:
        build("digits", evaluation=named("text", source="/nowhere", context=3))
    assert caught.value.where == "data.eval.args.source"
    with pytest.raises(DataError) as caught:
        build("digits", evaluation=named("torchvision/MNISR"))
    assert caught.value.where == "data.eval.name"


def test_a_first_sample_that_cannot_be_read_is_named():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("gone")

    with pytest.raises(DataError, match="sample 0 cannot be read: OSError: gone"):
        combine(Broken("abc"))


def test_objects_are_taken_as_they_are():
    train, evaluation = [torch.tensor(1)], [torch.tensor(2), torch.tensor(3)]
    sets = combine(train, evaluation)
    assert (sets.train, sets.eval) == (train, evaluation)
    assert len(combine(train, named("synthetic", kind="regression", samples=7)).eval) == 7
    with pytest.raises(DataError, match="is empty"):
        combine(train, [])
    with pytest.raises(DataError, match="is a stream"):
        combine(iter(train))


# ------------------------------------------------------------------------------------------------------ fingerprints


class Table:
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"x": self.values[index], "name": f"row {index}", "noise": torch.rand(())}


def test_the_fingerprint_changes_with_the_data_only():
    def fingerprint(values, **options):
        return combine(Table(values), **options).fingerprint

    values = torch.arange(9, dtype=torch.bfloat16)
    before = fingerprint(values)
    state = torch.get_rng_state()
    assert fingerprint(values) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(values[:8]) != before
    assert fingerprint(values.float()) != before
    for changed in (0, 4, 8):  # first, middle, last
        other = values.clone()
        other[changed] += 1
        assert fingerprint(other) != before
    assert len({fingerprint(values, evaluation=0.3, split_seed=s) for s in (0, 1)} | {before}) == 3


def test_a_dataset_may_have_a_fingerprint_of_its_own():
    class Owned(Table):
        def fingerprint(self):
            return "mine-7"

    assert combine(Owned(np.zeros(3))).fingerprint == "mine-7"


# --------------------------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("kind", ["classification", "regression", "causal_lm"])
def test_a_made_up_sample_depends_on_its_number_only(kind):
    args = {"kind": kind, "samples": 50}
    one, other = create("synthetic", "train", args), create("synthetic", "train", args)

    def parts(sample):
        return list(sample.values()) if isinstance(sample, dict) else list(sample)

    batch = parts(one.__getitems__([7, 3, 7]))
    for values in batch:
        assert torch.equal(values[0], values[2])
    for values, alone in zip(batch, parts(other[3]), strict=True):
        assert torch.equal(values[1], alone)
    assert not torch.equal(batch[0][0], batch[0][1])
    assert not torch.equal(parts(create("synthetic", "eval", args)[3])[0], batch[0][1])


def test_made_up_images_can_be_told_apart_by_their_class():
    args = {"kind": "classification", "samples": 600, "shape": [3, 8, 8], "classes": 4}
    images, labels = create("synthetic", "train", args).__getitems__(range(600))
    assert images.shape == (600, 3, 8, 8)
    assert sorted(labels.unique().tolist()) == [0, 1, 2, 3]
    held_out, true = create("synthetic", "eval", args).__getitems__(range(200))
    centres = torch.stack([images[labels == label].mean(0) for label in range(4)])
    nearest = torch.cdist(held_out.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == true).float().mean() > 0.95


def test_made_up_targets_are_linear_in_their_inputs():
    args = {"kind": "regression", "samples": 300, "shape": [5], "targets": 2}
    inputs, targets = create("synthetic", "train", args).__getitems__(range(300))
    weights = torch.linalg.lstsq(inputs, targets).solution
    torch.testing.assert_close(inputs @ weights, targets, atol=1e-4, rtol=1e-4)


def test_made_up_text_counts_by_a_stride():
    batch = create("synthetic", "train", {"kind": "causal_lm", "context": 20, "vocab": 31}).__getitems__(range(99))
    steps = batch["tokens"].diff(dim=1) % 31
    assert batch["tokens"].shape == (99, 21)
    assert (steps == steps[:, :1]).all()
    assert len(steps[:, 0].unique()) == 8


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"kind": "clasification"}, "no kind 'clasification'"),
        ({"kind": "regression", "classes": 3}, "no argument 'classes'"),
        ({"kind": "regression", "samples": 0}, "positive whole numbers, not 0"),
        ({"kind": "regression", "shape": [3, -1]}, "positive whole numbers, not -1"),
        ({}, "needs kind"),
    ],
)
def test_wrong_synthetic(args, problem):
    with pytest.raises(DataError, match=problem) as caught:
        create("synthetic", "train", args)
    assert caught.value.remedy
