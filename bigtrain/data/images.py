"""Images for classification: the digits inside scikit-learn, and folders of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bigtrain.data.fingerprints import Digest, hash_samples
from bigtrain.data.paths import missing
from bigtrain.errors import DataError

# Of all 1,797 × 64 pixels of scikit-learn's digits, scaled to [0, 1].
_DIGITS_MEAN, _DIGITS_STD = 0.3053, 0.3760


class TensorImages:
    """Images and labels in memory: float32 (samples, channels, height, width), int64 (samples,).

    Attributes:
        from_picture: Makes of an image of Pillow what a sample begins with.
    """

    is_random = False

    def __init__(
        self, images: Tensor, labels: Tensor, class_names: list[str], from_picture: Callable[[Any], Tensor]
    ) -> None:
        self.from_picture = from_picture
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.num_classes = len(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The whole batch by one gather."""
        # Through numpy, which takes a list ten times as fast as torch does.
        which = torch.from_numpy(np.fromiter(indices, np.int64, len(indices)))
        return self.images.index_select(0, which), self.labels.index_select(0, which)

    def fingerprint(self) -> str:
        """Changes with any pixel or label."""
        return str(Digest(self.images.numpy(), self.labels.numpy()))


def digits(split: str, *, size: int = 8, classes: Sequence[int] | None = None) -> TensorImages:
    """The 1,797 handwritten digits inside scikit-learn, 8 × 8 pixels: real data on every machine.

    Pixels are scaled to [0, 1], resized bilinearly, then normalised by the mean 0.3053 and standard deviation
    0.3760 of the 8 × 8 pixels; one channel.

    Args:
        split: Only `train`: there is no part for evaluation.
        size: Height and width to resize to.
        classes: The digits to take, which are then the classes in this order; null takes all ten.
    """
    from sklearn.datasets import load_digits

    if split != "train":
        raise DataError(
            "digits has no samples of its own for evaluation",
            where="data.eval",
            remedy="hold out a share of them: data.eval: {split: 0.2}",
        )
    if not (isinstance(size, int) and size > 0):
        raise DataError(
            f"size: {size!r} is not a positive number of pixels", where="data.args.size", remedy="give 8, or 28"
        )
    found = load_digits()
    images = torch.from_numpy(found.images).to(torch.float32).unsqueeze(1) / 16
    images = _as_digits(images, size)
    from_picture = partial(_digit, size=size)
    labels = torch.from_numpy(found.target.astype(np.int64))
    if classes is None:
        return TensorImages(images, labels, [str(name) for name in found.target_names], from_picture)
    if not classes or len(set(classes)) < len(classes) or any(digit not in range(10) for digit in classes):
        raise DataError(
            f"classes: {list(classes)} are not digits, each once",
            where="data.args.classes",
            remedy="give some of 0 to 9, as in [0, 1, 2]",
        )
    places = torch.full((10,), -1).scatter_(0, torch.tensor(list(classes)), torch.arange(len(classes)))
    chosen = places[labels] >= 0
    return TensorImages(images[chosen], places[labels[chosen]], [str(digit) for digit in classes], from_picture)


def _as_digits(images: Tensor, size: int) -> Tensor:
    """Images (n, 1, height, width) in [0, 1], resized and normalised."""
    if images.shape[-2:] != (size, size):
        shrinks = images.shape[-2] > size or images.shape[-1] > size
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return (images - _DIGITS_MEAN) / _DIGITS_STD


def _digit(picture: Any, size: int) -> Tensor:
    """A picture with light ink on a dark ground, as the digits have it; (1, size, size)."""
    grey = torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32)) / 255
    return _as_digits(grey[None, None], size)[0]


class LibraryImages:
    """A dataset of torchvision without transforms: a sample is (image of Pillow, label), mostly.

    Args:
        library: The library's dataset.
    """

    is_random = False
    has_pillow_images = True

    def __init__(self, library: Any) -> None:
        self._library = library
        classes = getattr(library, "classes", None)
        self.class_names: list[str] | None = [str(name) for name in classes] if classes else None
        self.num_classes: int | None = len(classes) if classes else None
        self.labels: Sequence[int] | None = getattr(library, "targets", None)

    def __len__(self) -> int:
        return len(self._library)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._library[index]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for missing and damaged files
            raise DataError(
                f"an image cannot be read: {error}",
                where=self._path(index),
                remedy="replace or delete the file",
            ) from error

    def _path(self, index: int) -> str | None:
        samples = getattr(self._library, "samples", None)
        return str(samples[index][0]) if samples else None

    def fingerprint(self) -> str:
        """Changes with the names of classes and files, and with the first, middle and last sample."""
        digest = Digest(f"{type(self._library).__qualname__} {self.class_names}")
        for path, label in getattr(self._library, "samples", ()):
            digest.add(f"{Path(path).relative_to(self._library.root)} {label}\n")
        digest.add(hash_samples(self))
        return str(digest)


class PicturesElsewhere:
    """What can be said of the pictures of an image folder that is not on this machine.

    Args:
        class_names: Of the classes, as a checkpoint keeps them.
    """

    has_pillow_images = True
    mode = "RGB"

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)


def read_picture(path: str | Path) -> Any:
    """A file as an image of Pillow, turned as its camera says; to train on and to predict from alike.

    Raises:
        DataError: Where its pixels have more than 8 bits: Pillow would cut them off at 255, without a word.
        OSError, SyntaxError, ValueError: Of Pillow, where the file cannot be read.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise DataError(
                f"the pixels of {str(path)!r} are numbers of more than 8 bits (mode {picture.mode}), and pictures are "
                "read in 8",
                where=str(path),
                remedy="scale its range to 0 … 255 and save it anew, or read it in a dataset of your own\n"
                "(docs/extending.md)",
            )
        return ImageOps.exif_transpose(picture).copy()


def _in_rgb(path: str) -> Any:
    return read_picture(path).convert("RGB")


def image_folder(split: str, *, root: str) -> LibraryImages:
    """Images in folders, root/<class>/<name>.png, in RGB; classes are numbered in the order of their names.

    Args:
        split: Not used: the images to evaluate on have a root of their own, or are a share of these.
        root: The folder of the classes' folders.

    Raises:
        DataError: If there is no such folder, or a class without images in it.
    """
    from torchvision.datasets import ImageFolder

    path = Path(root).expanduser()
    if not path.is_dir():
        raise missing(path, "a folder that holds a folder of images for each class", where="data.args.root")
    try:
        return LibraryImages(ImageFolder(str(path), loader=_in_rgb))
    except FileNotFoundError as error:
        raise DataError(
            f"{root!r} is not a folder of classes: {error}",
            where="data.args.root",
            remedy="lay the images out as root/<class>/<name>.png, every class with at least one",
        ) from error
