"""The digits, image folders and torchvision's datasets, from real files."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bigtrain.data import EvalLoader, TrainLoader, build, combine, create, images
from bigtrain.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images: cats are red, dogs are blue; the level tells them apart."""
    for number in range(3):
        for name, pixel in [("cat", (50 * number, 0, 0)), ("dog", (0, 0, 50 * number))]:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (5, 4), pixel).save(tmp_path / name / f"{number}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, found = create("digits", "train"), load_digits()
    images, labels = digits.__getitems__(range(len(digits)))
    assert (images.shape, images.dtype, labels.dtype) == ((1797, 1, 8, 8), torch.float32, torch.int64)
    np.testing.assert_allclose(images[:, 0] * 0.3760 + 0.3053, found.images / 16, atol=1e-6)
    np.testing.assert_array_equal(labels, found.target)
    assert (digits.num_classes, digits.class_names) == (10, list("0123456789"))


def test_digits_are_normalised():
    images = create("digits", "train").images.double()
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_digits_are_resized_bilinearly():
    small, large = create("digits", "train").images, create("digits", "train", {"size": 16}).images
    assert large.shape == (1797, 1, 16, 16)
    # The centre of output pixel 1 lies at (1 + 1/2) · 8/16 − 1/2 = 1/4: a quarter of the way from pixel 0 to 1.
    rows = 0.75 * small[:, 0, 0] + 0.25 * small[:, 0, 1]
    torch.testing.assert_close(large[:, 0, 1, 1], 0.75 * rows[:, 0] + 0.25 * rows[:, 1])


def test_one_digit_is_a_row_of_the_batch():
    digits = create("digits", "train", {"size": 28})
    images, labels = digits.__getitems__([5, 3])
    assert torch.equal(images[1], digits[3][0])
    assert labels[0] == digits[5][1]


@pytest.mark.parametrize("size", [0, -1, 2.5, "28"])
def test_digits_of_no_size_are_refused(size):
    with pytest.raises(DataError, match="not a positive number of pixels"):
        create("digits", "train", {"size": size})


def test_digits_have_no_part_for_evaluation():
    with pytest.raises(DataError, match="no samples of its own") as caught:
        create("digits", "eval", where="data.eval")
    assert "split" in caught.value.remedy


# ----------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_classes(folder):
    sets = build("image_folder", {"root": str(folder)})
    assert sets.train.class_names == ["cat", "dog"]
    (batch,) = EvalLoader(sets.train, batch_size=6)
    images, labels = batch.data
    assert (images.shape, images.dtype) == ((6, 3, 4, 5), torch.float32)
    assert type(images) is torch.Tensor
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = [[0, 0, 0], [50, 0, 0], [100, 0, 0], [0, 0, 0], [0, 0, 50], [0, 0, 100]]
    torch.testing.assert_close(images[:, :, 3, 4] * 255, torch.tensor(pixels, dtype=torch.float32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, workers):
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    sets = build("image_folder", {"root": str(folder)})
    loader = EvalLoader(sets.train, batch_size=1, workers=workers)
    with pytest.raises(DataError, match="an image cannot be read") as caught:
        list(loader)
    assert caught.value.where == f"sample 4: {folder / 'dog' / '1.png'}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanished_is_named(folder, workers):
    sets = build("image_folder", {"root": str(folder)})
    (folder / "cat" / "2.png").unlink()
    with pytest.raises(DataError, match="No such file") as caught:
        list(EvalLoader(sets.train, batch_size=2, workers=workers))
    assert "sample 2" in caught.value.where


def test_pictures_are_turned_as_their_cameras_say(folder):
    upright = np.zeros((4, 5, 3), np.uint8)
    upright[0] = 255
    turned = Image.fromarray(np.rot90(upright).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # EXIF 2.32, 4.6.4: Orientation; 6 is to be turned by 90° clockwise
    turned.save(folder / "cat" / "0.png", exif=exif)
    to_train_on, _ = create("image_folder", "train", {"root": str(folder)})[0]
    for read in (to_train_on, images.read_picture(folder / "cat" / "0.png")):
        np.testing.assert_array_equal(np.asarray(read), upright)


@pytest.mark.parametrize(("dtype", "name"), [(np.uint16, "x.png"), (np.int32, "x.tiff"), (np.float32, "x.tiff")])
def test_pixels_of_more_than_8_bits_are_refused_and_not_cut_off(folder, dtype, name):
    path = folder / "cat" / name
    Image.fromarray(np.full((4, 5), 4095).astype(dtype)).save(path)
    dataset = create("image_folder", "train", {"root": str(folder)})
    with pytest.raises(DataError, match="more than 8 bits") as caught:
        dataset[3]
    assert caught.value.where == str(path)


def test_a_folder_that_is_not_there_names_the_nearest_that_is(folder):
    with pytest.raises(DataError, match="there is no") as caught:
        create("image_folder", "train", {"root": str(folder / "cats" / "small")})
    assert f"up to {folder}, which holds cat" in caught.value.remedy


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a folder of classes"):
        create("image_folder", "train", {"root": str(tmp_path)})


def test_training_and_evaluation_must_have_the_same_classes(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "cat").mkdir()
    Image.new("RGB", (5, 4)).save(other / "cat" / "0.png")
    named = SimpleNamespace(name="image_folder", args={"root": str(other)})
    with pytest.raises(DataError, match="different classes: 'dog' and None"):
        build("image_folder", {"root": str(folder)}, evaluation=named)


def test_the_fingerprint_of_a_folder_follows_its_files(folder):
    def fingerprint():
        return build("image_folder", {"root": str(folder)}).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (folder / "dog" / "1.png").rename(folder / "dog" / "7.png")
    assert fingerprint() != before


# ------------------------------------------------------------------------------------------------------- torchvision


def write_mnist(root, images: np.ndarray, labels: list[int], prefix: str) -> None:
    """In the format of the originals: http://yann.lecun.com/exdb/mnist, big-endian sizes and bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + bytes(labels))


def test_files_that_are_here_are_read(tmp_path):
    images = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    write_mnist(tmp_path, images, [3, 1, 4], "train")
    write_mnist(tmp_path, images[:1], [5], "t10k")
    args = {"root": str(tmp_path)}
    train, evaluation = (combine(create("torchvision/MNIST", split, args)).train for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (3, 1)
    found, labels = next(TrainLoader(train, batch_size=3).steps()).microbatches[0].data
    order = labels.tolist()
    assert sorted(order) == [1, 3, 4]
    torch.testing.assert_close(found[order.index(4), 0], torch.tensor(images[2] / 255, dtype=torch.float32))
    assert train.num_classes == 10


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_files_that_cannot_be_had_are_listed(name, tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there: no network
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataError, match=f"torchvision/{name} cannot be read or downloaded") as caught:
        create(f"torchvision/{name}", "train", {"root": str(tmp_path)})
    first = {"MNIST": "MNIST/raw/train-images-idx3-ubyte.gz", "CIFAR10": "cifar-10-batches-py/data_batch_1"}[name]
    assert str(tmp_path / first) in caught.value.remedy


def test_what_the_library_makes_up_is_read():
    sets = build("torchvision/FakeData", {"size": 7, "image_size": [3, 6, 6], "num_classes": 2}, evaluation=2 / 7)
    assert (len(sets.train), len(sets.eval)) == (5, 2)
    assert next(TrainLoader(sets.train, batch_size=5).steps()).microbatches[0].data[0].shape == (5, 3, 6, 6)


@pytest.mark.parametrize(
    ("name", "args", "problem", "remedy"),
    [
        ("MNISt", {}, "no dataset 'MNISt'", "MNIST"),
        ("ImageFolder", {}, "no dataset 'ImageFolder'", "image_folder"),
        ("FakeData", {"sizes": 3}, "no argument 'sizes'", "size"),
        ("FakeData", {"transform": 1}, "transform cannot be given", "data.transforms"),
        ("SVHN", {"root": "/nowhere", "split": "all", "download": False}, "Unknown value 'all'", "value"),
    ],
)
def test_wrong_names_and_arguments(name, args, problem, remedy):
    with pytest.raises(DataError, match=problem) as caught:
        create(f"torchvision/{name}", "train", args)
    assert remedy in caught.value.remedy


def test_some_of_the_digits():
    whole, some = images.digits("train"), images.digits("train", classes=[7, 2])
    assert some.class_names == ["7", "2"]
    for place, digit in enumerate((7, 2)):
        assert torch.equal(some.images[some.labels == place], whole.images[whole.labels == digit])
    assert len(some) == int(((whole.labels == 7) | (whole.labels == 2)).sum())


@pytest.mark.parametrize("classes", [[], [1, 1], [10], ["1"]])
def test_classes_that_are_no_digits(classes):
    with pytest.raises(DataError, match="are not digits"):
        images.digits("train", classes=classes)
