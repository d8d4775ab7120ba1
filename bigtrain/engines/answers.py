"""What a task's loss returned: whether an engine can go backward from it, and what is wrong where it cannot."""

from __future__ import annotations

from torch import Tensor

from bigtrain.errors import UserError
from bigtrain.protocols import LossSum

_REMEDY = "return LossSum(total, count): the sum of the losses, not their mean, and how many there are"


def checked(result: LossSum) -> LossSum:
    """What a task's loss returned, if it is what it must be.

    Raises:
        UserError: Where it is not.
    """
    if isinstance(result, LossSum):
        return result
    raise UserError(f"the task's loss returned {type(result).__name__}", where="task", remedy=_REMEDY)


def refuse_without_gradient(result: LossSum) -> None:
    """Say why no gradient can come from a loss, after the attempt has failed: a look beforehand costs time.

    Raises:
        UserError: Where the sum is no tensor, not one number, or does not depend on what is trained.
    """
    total = result.total
    if not isinstance(total, Tensor):
        raise UserError(
            f"the total of the task's loss is a {type(total).__name__}, not a tensor", where="task", remedy=_REMEDY
        )
    if total.numel() != 1:
        said = f"the total of the task's loss has the shape {tuple(total.shape)}, and must be one number"
        raise UserError(said, where="task", remedy="sum it over the samples: total.sum()")
    if not total.requires_grad:
        raise UserError(
            "the loss does not depend on any parameter that is trained",
            where="task, model",
            remedy="look for .detach(), .item(), torch.no_grad() or argmax between the parameters and the total,\n"
            "and for frozen parameters (finetune.freeze, requires_grad=False) that the loss needs",
        )
