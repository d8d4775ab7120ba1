"""Transforms of images by name, from torchvision.transforms.v2.

They see the image of a sample, its first part, one sample at a time. An image of Pillow becomes a uint8
tensor before the first transform, and what is still uint8 after the last becomes float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bigtrain.data.randomness import is_random
from bigtrain.errors import DataError
from bigtrain.named import call, suggest
from bigtrain.protocols import Dataset

# All others are taken to draw random numbers: to seed for nothing costs microseconds.
_NOT_RANDOM = {"CenterCrop", "ConvertImageDtype", "Grayscale", "Normalize", "Pad", "PILToTensor", "RGB", "Resize"}
_NOT_RANDOM |= {"ToDtype", "ToImage", "ToPureTensor"}
_NOT_FOR_A_RUN_FILE = {
    "Compose": "the list is one already",
    "Lambda": "it needs code: write a dataset of your own",
    "LinearTransformation": "it needs matrices: write a dataset of your own",
    "MixUp": "it mixes the samples of a batch: set data.mix={mixup: 0.2}",
    "CutMix": "it mixes the samples of a batch: set data.mix={cutmix: 1.0}",
    "FiveCrop": "it makes several images of one",
    "TenCrop": "it makes several images of one",
    "ToPILImage": "a model needs tensors",
}


@runtime_checkable
class Named(Protocol):
    """A name and arguments, as the run file has them."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def args(self) -> Mapping[str, Any]:
        """The keyword arguments."""


class Transformed:
    """A dataset whose images are transformed; all else about it is the base's own.

    Args:
        base: The samples: an image, or a tuple or list that begins with one.
        transforms: Names from torchvision.transforms.v2.
        where: The key of the run file, for errors.

    Raises:
        DataError: If there is no such transform, or an argument does not fit.
    """

    def __init__(self, base: Dataset, transforms: Sequence[Named], *, where: str) -> None:
        self.base = base
        self._steps = [(item.name, _make(item.name, item.args, f"{where}.{i}")) for i, item in enumerate(transforms)]
        self.is_random = is_random(base) or any(name not in _NOT_RANDOM for name, _ in self._steps)

    def __getattr__(self, name: str) -> Any:
        if name in ("collate", "fingerprint", "num_classes", "class_names", "labels"):
            return getattr(self.base, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        sample = self.base[index]
        if isinstance(sample, (tuple, list)):
            return (self._apply(sample[0]), *sample[1:])
        return self._apply(sample)

    def _apply(self, image: Any) -> Tensor:
        from torchvision.transforms.v2 import functional

        if not isinstance(image, Tensor):
            image = _call("ToImage", functional.to_image, image)
        for name, transform in self._steps:
            image = _call(name, transform, image)
        if image.dtype == torch.uint8:
            image = functional.to_dtype(image, torch.float32, scale=True)
        plain: Tensor = image.as_subclass(Tensor)
        return plain


def _call(name: str, transform: Callable[[Any], Any], image: Any) -> Any:
    try:
        return transform(image)
    except Exception as error:
        shape = f", {tuple(image.shape)}, {image.dtype}" if isinstance(image, Tensor) else ""
        raise DataError(
            f"the transform {name} failed on {type(image).__name__}{shape}: {error}",
            where="data.transforms",
            remedy="transforms see an image, (channels, height, width); before one that needs floats,\n"
            "as Normalize does, put ToDtype with {dtype: float32, scale: true}",
        ) from error


def _make(name: str, args: Mapping[str, Any], where: str) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    if name in _NOT_FOR_A_RUN_FILE:
        raise DataError(f"the transform {name} cannot be used here", where=where, remedy=_NOT_FOR_A_RUN_FILE[name])
    known = [key for key, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)]
    known = [key for key in known if key != "Transform" and key not in _NOT_FOR_A_RUN_FILE]
    if name not in known:
        raise DataError(f"there is no transform {name!r}", where=where, remedy=suggest(name, known, "transforms"))
    values = {key: _value(key, value, where) for key, value in args.items()}
    transform: Callable[[Any], Any] = call(getattr(v2, name), values, name=name, error=DataError, where=where)
    return transform


def _value(key: str, value: Any, where: str) -> Any:
    """An argument of a transform out of the words and numbers that a run file can hold."""
    from torchvision.transforms.autoaugment import AutoAugmentPolicy
    from torchvision.transforms.functional import InterpolationMode

    if key == "transforms" and isinstance(value, list):
        return [_make(*_parts(item), where) for item in value]
    words: dict[str, dict[str, Any]] = {
        "dtype": {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.uint8)},
        "interpolation": {mode.value: mode for mode in InterpolationMode},
        "policy": {policy.value: policy for policy in AutoAugmentPolicy},
    }
    if key not in words or not isinstance(value, str):
        return value
    if value not in words[key]:
        raise DataError(f"{key}: {value!r} is not known", where=where, remedy=suggest(value, words[key], "values"))
    return words[key][value]


def _parts(item: Any) -> tuple[str, Mapping[str, Any]]:
    return (item, {}) if isinstance(item, str) else (item["name"], item.get("args", {}))
