"""What a user may bring (a model, data, a task), and the three small values that travel between the parts.

Everything here is structural: a class that has these methods fits, and none of them has to be inherited.
docs/extending.md shows an example of each; a test runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(slots=True)  # frozen, it would take twice as long to make, in a loader that counts microseconds
class Batch:
    """One microbatch on one rank. Nothing changes it: `dataclasses.replace` makes another.

    Attributes:
        data: What the data's `collate` made of the samples: tensors in tuples, lists or dicts, each with samples first.
        weight: Shape (samples,), float32: 1 for a sample that counts, 0 for one that only fills up. The ones come
            first.
        num_valid: How many samples count, known without asking the device.
        indices: The samples' indices in the dataset, so that a bad one can be named; on the host.
    """

    data: Any
    weight: Tensor
    num_valid: int
    indices: Sequence[int] = field(default=(), repr=False)

    def __len__(self) -> int:
        return self.weight.shape[0]


class LossSum(NamedTuple):
    """What a task's `loss` returns: sums, so that uneven microbatches and ranks weigh right.

    Attributes:
        total: Shape (), the sum of the losses of all targets that count, attached to the graph.
        count: How many targets count: a tensor of shape () on the model's device, or a number.
        preds: What metrics compare, samples first; None where the task's metrics do not need it.
        target: What it is compared with.
    """

    total: Tensor
    count: Tensor | float  # type: ignore[assignment] # tuple.count, which nobody calls
    preds: Tensor | None = None
    target: Tensor | None = None


class Metrics(Protocol):
    """An accumulator over one evaluation.

    It may also have `to(device)`, called once before the first microbatch, to put its state there.
    """

    def update(self, result: LossSum, batch: Batch) -> None:
        """Add one microbatch; samples of weight 0 must not count."""

    def compute(self) -> dict[str, Any]:
        """Sum over all ranks (`bigtrain.sum_over_ranks`) and return numbers by name. Every rank must call it."""


class Task(Protocol):
    """What is learnt: a loss, and how to measure it.

    A task may also have `check(model, batch) -> None`, called once before the first step with the first microbatch,
    still on the host, to refuse what does not fit with a clear error; and `check_data(dataset) -> None`, called with
    each dataset afterwards, for what it says of all its samples (`num_classes`). One that says
    `wants_labels = True` has `see_labels(labels, class_names) -> None`, called first of all with the labels of all
    samples to train on (the dataset's `labels`), in an evaluation by `bigtrain eval` too.
    """

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Run the model on a microbatch and sum the losses of its targets; `batch.weight` says which samples count."""

    def metrics(self) -> Metrics:
        """A fresh accumulator for one evaluation; it may be a metric of torchmetrics for `preds` and `target`."""


@runtime_checkable
class Dataset(Protocol):
    """Samples by number. `factory(split, **args)` returns one, for the splits `train` and `eval`.

    It may also have:
        `__getitems__(indices) -> list | batch`: many samples at once: a list of samples, or the whole batch as
            `collate` would
            have made it (when the dataset has no `collate` of its own and does not return a list).
        `collate(samples) -> batch`: instead of torch's default_collate.
        `fingerprint() -> str`: changes when the data do; the default hashes the length and the first, middle and last
            samples. `num_classes: int`, `class_names: list[str]`: for labels.
        `from_picture(image) -> Any`: what a sample begins with, out of an image of Pillow, for `bigtrain predict`.
    """

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int) -> Any:
        """One sample."""


class HasBlocks(Protocol):
    """A model that names its repeated parts, for sharding, activation checkpointing and compile."""

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts, in the order in which they run."""


class HasFlops(Protocol):
    """A model that knows its cost."""

    def flops_per_sample(self) -> float:
        """Floating-point operations of one forward and backward pass of one sample, without what is masked."""


class HasInitTensor(Protocol):
    """A model that can be built on the meta device and filled piece by piece."""

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fill `tensor`, a piece of any shape of the parameter or persistent buffer `name`.

        Elements must not depend on the shape of the piece nor on each other; draw random numbers from torch's default
        generator, which is seeded for each piece.
        """


class SumsCrossEntropy(Protocol):
    """A language model that can sum its loss itself, so that logits need not be whole."""

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sum_cross_entropy_of: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, vocabulary); or, given targets (B, T) int64, the sum of their cross-entropies.

        The sum has shape () and is float32 or better; -100 does not count. It must be computed inside forward: under
        FSDP2 and ZeRO-3 weights are whole only while their module's forward runs.
        """
