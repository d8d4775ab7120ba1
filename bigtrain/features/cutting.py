"""Where a model is cut into a frozen extractor and a head that trains, and whether it may be.

The head is the largest part of the model of which everything trains. What goes into it are the features, if they are
all that it sees, and if nothing comes after it. That is not believed: it is tried on two samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.engines.base import Evaluator
from bigtrain.errors import CombinationError
from bigtrain.protocols import Batch, Task

_KEY = "finetune.feature_cache"
_ROUNDING = 1e-5


def find_head(model: nn.Module, trained: Collection[str]) -> str:
    """The name of the part that trains.

    Raises:
        CombinationError: Where it is not one part, or nothing is frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    paths = [name.split(".")[:-1] for name in trained]
    head = list(paths[0]) if paths else []
    while head and not all(path[: len(head)] == head for path in paths):
        head.pop()
    while head and _trains_whole(names, trained, head[:-1]) and _is_called(model, head[:-1]):
        head.pop()
    if not head:
        raise CombinationError(
            "features can be kept where one part of the model trains, the last one, and all before it is frozen",
            where=_KEY,
            remedy="freeze all but the head (finetune.freeze), or take finetune.feature_cache out",
        )
    return ".".join(head)


def _trains_whole(names: Collection[str], trained: Collection[str], path: list[str]) -> bool:
    prefix = ".".join([*path, ""]) if path else ""
    return all(name in trained for name in names if name.startswith(prefix))


def _is_called(model: nn.Module, path: list[str]) -> bool:
    return not isinstance(model.get_submodule(".".join(path)), (nn.ModuleList, nn.ModuleDict))


class Cut:
    """A model, its head, and what goes into it.

    Args:
        model: The plain module.
        name: The head's name.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self._model, self._head = name, model, model.get_submodule(name)
        self._seen: list[tuple[Any, Any]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what goes into the head."""
        see = self._head.register_forward_pre_hook(
            lambda module, args, kwargs: self._seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            yield
        finally:
            see.remove()

    def features(self) -> Tensor:
        """What went into the head since the last call.

        Raises:
            CombinationError: Where that was not one tensor, once.
        """
        seen, self._seen = self._seen, []
        if len(seen) == 1 and len(seen[0][0]) == 1 and not seen[0][1] and isinstance(seen[0][0][0], Tensor):
            features: Tensor = seen[0][0][0]
            return features.detach()
        raise CombinationError(
            f"{self.name} is called {len(seen)} times in a forward pass, or with other than one tensor",
            where=_KEY,
            remedy="features can be kept where the head takes one tensor, once; take finetune.feature_cache out",
        )

    def apply(self) -> Callable[[], None]:
        """Let the model be its head alone, on features; what is returned undoes it."""
        before = vars(self._model).get("forward")
        self._model.forward = partial(_only, self._head)

        def undo() -> None:
            del self._model.forward
            if before is not None:
                self._model.forward = before

        return undo

    def check(self, engine: Evaluator, task: Task, batch: Batch) -> None:
        """See by two samples that head and features are all there is to the loss. Every rank must call it.

        Raises:
            CombinationError: Where they are not.
        """
        if not isinstance(batch.data, (tuple, list)) or not all(isinstance(part, Tensor) for part in batch.data[1:]):
            raise CombinationError(
                "features can be kept of samples that are (input, target)",
                where=_KEY,
                remedy="take finetune.feature_cache out",
            )
        with engine.evaluating(), self.watched():
            expected = float(task.loss(engine.model, batch).total)
            features = self.features()
            nn.Module.train(engine.model)
            nn.Module.train(self._head, False)  # its statistics are not to be moved by a trial
            task.loss(engine.model, batch)
            nn.Module.train(engine.model, False)
            in_training = self.features()
        if not torch.equal(features, in_training):
            raise CombinationError(
                f"what is before {self.name} says something else in training than in evaluation",
                where=_KEY,
                remedy="it has dropout, say, which would be drawn once and for all: set its rate to 0 (model.args),\n"
                "or take finetune.feature_cache out",
            )
        undo = self.apply()
        try:
            with engine.evaluating():
                found = float(task.loss(engine.model, with_features(batch, features)).total)
        except (RuntimeError, TypeError, ValueError):
            found = float("nan")
        finally:
            undo()
        if not abs(found - expected) <= _ROUNDING * abs(expected):
            raise CombinationError(
                f"the loss is not that of {self.name} alone: the model does more after it, or beside it",
                where=_KEY,
                remedy="take finetune.feature_cache out",
            )


def with_features(batch: Batch, features: Tensor) -> Batch:
    """A batch whose inputs are features."""
    return Batch((features, *batch.data[1:]), batch.weight, batch.num_valid, batch.indices)


def _only(head: nn.Module, features: Tensor) -> Any:
    return head(features)
