"""Tasks by name."""

import pytest
from torch import nn

from bigtrain import tasks
from bigtrain.errors import UserError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.classification import Classification


class Doubled(Classification):
    """A task of one's own."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        result = super().loss(model, batch)
        return result._replace(total=2 * result.total)


class Lossless:
    def metrics(self) -> None: ...


@pytest.mark.parametrize("name", tasks.names())
def test_every_name_makes_a_task(name):
    task = tasks.build(name)
    assert callable(task.loss)
    assert task.metrics().compute() is not None


def test_a_task_of_ones_own():
    task = tasks.build(f"{__name__}:Doubled", {"num_classes": 3})
    assert isinstance(task, Doubled)
    assert task.num_classes == 3


@pytest.mark.parametrize(
    ("name", "args", "where", "said"),
    [
        ("clasification", {}, "task.name", "did you mean classification or text_classification?"),
        ("casual_lm", {}, "task.name", "did you mean causal_lm?"),
        ("zzz", {}, "task.name", "the tasks are: classification, causal_lm, regression"),
        ("classification", {"smoothing": 0.1}, "task.args", "did you mean label_smoothing?"),
        ("causal_lm", {"context": 3}, "task.args", "it takes: no arguments"),
        ("no_such_module:Task", {}, "task.name", "there is no module 'no_such_module'"),
        (f"{__name__}:Lossless", {}, "task.name", "which has no loss"),
    ],
)
def test_what_cannot_be_built(name, args, where, said):
    with pytest.raises(UserError) as caught:
        tasks.build(name, args)
    assert caught.value.where == where
    assert said in str(caught.value)
