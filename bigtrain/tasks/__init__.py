"""Tasks by name: what is learnt, as a loss over microbatches, and how it is measured.

A task sees a model it can call and a batch, and returns sums; it knows no engine, and divides by nothing,
because only the engine knows the whole global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.catalogue import TASKS
from bigtrain.errors import UserError
from bigtrain.named import call, load, suggest
from bigtrain.protocols import Task


def names() -> list[str]:
    """The tasks that have a name of their own."""
    return list(TASKS)


def build(name: str, args: Mapping[str, Any] | None = None) -> Task:
    """Build a task.

    Args:
        name: One of `names()`, or `package.module:Class`.
        args: Its arguments.

    Raises:
        UserError: Where there is no such task, an argument does not fit, or what comes out has no `loss` and
            `metrics`.
    """
    if ":" not in name and name not in TASKS:
        remedy = suggest(name, TASKS, "tasks") + "\na task of your own is package.module:Class"
        raise UserError(f"there is no task {name!r}", where="task.name", remedy=remedy)
    factory = load(TASKS.get(name, name), error=UserError, where="task.name")
    return checked(call(factory, args or {}, name=name, error=UserError, where="task.args"), name)


def checked(task: Any, name: str) -> Task:
    """The task, if it can do what a task must.

    Raises:
        UserError: Where it has no `loss` and `metrics`, or is a class.
    """
    if isinstance(task, type):
        raise UserError(f"the task {name} is a class", where="task.name", remedy="give an instance of it")
    lacking = [method for method in ("loss", "metrics") if not callable(getattr(task, method, None))]
    if lacking:
        raise UserError(
            f"the task {name} is a {type(task).__name__}, which has no {' and no '.join(lacking)}",
            where="task.name",
            remedy="a task has loss(model, batch) -> LossSum, and metrics()",
        )
    return task  # type: ignore[no-any-return]
