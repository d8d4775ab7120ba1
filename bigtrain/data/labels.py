"""The labels of all samples, where a dataset has them at hand: no sample is read for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.split import Part
from bigtrain.errors import DataError
from bigtrain.protocols import Dataset


def labels_of(dataset: Dataset) -> NDArray[np.int64]:
    """The label of every sample, in the order of their numbers.

    Raises:
        DataError: Where the dataset does not tell them.
    """
    if isinstance(dataset, Part):
        return labels_of(dataset.base)[dataset.locate(np.arange(len(dataset)))]
    found: Any = getattr(dataset, "labels", None)
    if found is None or len(found) != len(dataset):
        raise DataError(
            f"{type(dataset).__name__} does not tell the labels of all its samples",
            where="data",
            remedy="give it an attribute `labels`, one integer a sample",
        )
    return np.asarray(found, dtype=np.int64)
