"""What a trained model says of inputs that are in no dataset: a class for a picture or a text, the rest of a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.data import create
from bigtrain.data.images import PicturesElsewhere, read_picture
from bigtrain.data.paths import missing
from bigtrain.data.transforms import Transformed
from bigtrain.errors import CombinationError, DataError, UserError
from bigtrain.evaluating.answers import Prediction
from bigtrain.evaluating.texts import CLASSIFIED, Generating, classes_of, continuations_of
from bigtrain.evaluating.trained import Trained, refuse_given
from bigtrain.protocols import Dataset
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.tensors import at_least_fp32, outputs

_THE_LIKELIEST = Generating()


def predict(trained: Trained, inputs: Sequence[str], generating: Generating = _THE_LIKELIEST) -> Iterator[Prediction]:
    """What the model says of each input, in order.

    Args:
        trained: The model.
        inputs: Pictures' files, or folders of them, for a classification; texts for one of texts; prompts for a
            language model. `@file` is a file with a text in it.
        generating: How a text is gone on with.

    Raises:
        UserError: Where the task is neither of both.
        DataError: Where a file is missing or no picture, or a prompt does not fit the model; the input is named.
    """
    if isinstance(trained.task, Classification):
        if trained.config.data.name == CLASSIFIED:
            return classes_of(trained, inputs, generating.tokenizer)
        return _classes(trained, inputs)
    if isinstance(trained.task, CausalLM):
        return continuations_of(trained, inputs, generating)
    raise UserError(
        f"the task {trained.config.task.name} cannot predict from the command line",
        where="task.name",
        remedy="classification takes pictures or texts, causal_lm takes text; others are opened in Python:\n"
        "with bigtrain.load_trained(path) as trained: trained.model(…)",
    )


# ---- pictures ----------


def _classes(trained: Trained, inputs: Sequence[str]) -> Iterator[Prediction]:
    config = trained.config
    refuse_given(config, "data")
    inputs = [path for each in inputs for path in _files_of(each)]
    data, first, shape = _data_of(trained)
    names = getattr(data, "class_names", None)
    size = config.data.batch_size
    for start in range(0, len(inputs), size):
        paths = [Path(path) for path in inputs[start : start + size]]
        pictures = []
        for path in paths:
            pictures.append(_image(path, data, first, shape, trained))
            shape = shape or pictures[0].shape
        images = torch.stack(pictures).to(trained.world.device, trained.dtype())
        with trained.evaluating():
            shares = at_least_fp32(outputs(_ask(trained, images, data))).softmax(1)
        best, labels = (part.tolist() for part in shares.max(1))
        for path, probability, label in zip(paths, best, labels, strict=True):
            name = names[label] if names and label < len(names) else str(label)
            yield Prediction(str(path), {"class": str(name), "probability": round(probability, 6), "label": label})


def _files_of(place: str) -> list[str]:
    """The pictures of a folder and all folders in it, by name; of a file that file."""
    if not os.path.isdir(place):
        return [place]
    from torchvision.datasets.folder import IMG_EXTENSIONS  # what is read for a training, too

    files = [os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names]
    found = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
    if not found:
        raise DataError(
            f"the folder {place!r} holds no pictures",
            where="INPUT",
            remedy=f"give one that holds some, or files; pictures end in {', '.join(IMG_EXTENSIONS)}",
        )
    return found


def _data_of(trained: Trained) -> tuple[Any, Any, torch.Size | None]:
    """What the model was trained on, its first sample as the data have it, and the shape that transforms give that.

    Pictures in folders may be elsewhere by now: there is neither then.
    """
    config, names = trained.config, trained.kept.get("class_names")
    data: Any
    if (
        config.data.name == "image_folder"
        and names
        and not Path(str(config.data.args.get("root"))).expanduser().exists()
    ):
        return PicturesElsewhere(names), None, None
    data = create(config.data.name, "train", config.data.args)
    first = data[0]
    transformed = Transformed(_One(first), config.data.transforms.eval, where="data.transforms.eval")
    return data, first, _sample(transformed, "the data").shape


def _ask(trained: Trained, images: Tensor, data: Any) -> Any:
    """The model's answer; pictures of a size that nobody could compare may not suit it."""
    try:
        return trained.model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        if not isinstance(data, PicturesElsewhere):
            raise
        raise DataError(
            f"the model does not take pictures of {tuple(images.shape[1:])}: {error}",
            where="INPUT",
            remedy="give pictures of the size of those that it was trained on, which are not on this machine:\n"
            f"data.args.root is {trained.config.data.args['root']}",
        ) from error


def _sample(data: Dataset, what: str) -> Tensor:
    sample = data[0]
    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise CombinationError(
            f"{what} are no pictures (channels, height, width)",
            where="data.name",
            remedy="bigtrain predict classifies pictures; for others open the checkpoint in Python:\n"
            "with bigtrain.load_trained(path) as trained: trained.model(…)",
        )
    return image


class _One:
    """A sample as the data would have it, before transforms."""

    def __init__(self, sample: Any) -> None:
        self._sample = sample

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self._sample


def _image(path: Path, data: Any, first: Any, shape: torch.Size | None, trained: Trained) -> Tensor:
    """A file as the model takes it: as the data would have read it, in their channels and size."""
    picture, is_elsewhere = _read(path), isinstance(data, PicturesElsewhere)
    if hasattr(data, "from_picture"):
        made = data.from_picture(picture)
    elif getattr(data, "has_pillow_images", False):
        made = picture.convert(data.mode if is_elsewhere else first[0].mode)
    else:
        raise CombinationError(
            f"the data {trained.config.data.name} do not say how a picture becomes one of their samples",
            where="data.name",
            remedy="give the dataset a method from_picture(image), which makes of an image of Pillow what its samples "
            "begin with",
        )
    transforms = trained.config.data.transforms.eval
    image = _sample(Transformed(_One(made), transforms, where="data.transforms.eval"), str(path))
    if shape is None:
        return image
    if image.shape != shape and not isinstance(made, Tensor) and not is_elsewhere:
        made = made.resize(first[0].size)
        image = _sample(Transformed(_One(made), transforms, where="data.transforms.eval"), str(path))
    if image.shape != shape:
        raise DataError(
            f"{str(path)!r} becomes {tuple(image.shape)}, and "
            + f"{'the first one' if is_elsewhere else 'the data are'} {tuple(shape)}",
            where=str(path),
            remedy="let data.transforms.eval end in one size: Resize with {size: [height, width]}",
        )
    return image


def _read(path: Path) -> Any:
    from PIL import Image

    if not path.is_file():
        raise missing(path, "the files of pictures, as in/*.png, or their folder", where="INPUT")
    try:
        return read_picture(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{str(path)!r} is no picture that can be read: {error}",
            where=str(path),
            remedy="give PNG or JPEG files",
        ) from error
