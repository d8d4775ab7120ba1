"""Random choices about a sample: the same wherever and whenever the sample is read.

Augmentations draw from the global generators of Python, numpy and torch. Before each sample these are seeded
from (seed, epoch, index), so a sample does not depend on who read what before. Afterwards they are put back:
dropout, which draws from torch's generator too, must not depend on augmentation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from bigtrain.data.order import mix

_STREAM = 0xA06_3E47


def is_random(dataset: Any) -> bool:
    """Whether reading a sample may draw random numbers.

    A dataset says so itself by `is_random`. Of those that do not, one that is read by whole batches is taken
    not to be random, and one that is read sample by sample, so may have transforms inside, is: a seed too
    many costs some microseconds, one too few costs the reproducibility of the run.
    """
    declared = getattr(dataset, "is_random", None)
    if declared is None and isinstance(dataset, Subset):  # reads whole batches of whatever it wraps
        return is_random(dataset.dataset)
    return not hasattr(dataset, "__getitems__") if declared is None else bool(declared)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Leave the global generators as they were."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def seed_generators(seed: int, epoch: int, index: int) -> None:
    """Seed the global generators for one sample."""
    word = mix(_STREAM, seed, epoch, index)
    random.seed(word)
    np.random.seed(word & 0xFFFF_FFFF)
    # Not torch.manual_seed: that seeds the accelerators too, whose generators belong to the model.
    torch.default_generator.manual_seed(word)
