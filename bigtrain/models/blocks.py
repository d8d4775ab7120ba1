"""Questions about any module: which parts repeat, what is not decayed, what would differ between processes.

A model may answer the first itself, by `blocks()`; everything else is found by looking.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bigtrain.errors import ModelError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_BY_NAME = re.compile(r"norm(\dd)?$", re.IGNORECASE)  # RMSNorm, LlamaRMSNorm, LayerNorm2d, …


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated parts of a model with their names, in order, no part inside another.

    A model that has `blocks()` is asked. In any other, blocks are the members of module lists and sequences
    that have parameters and parts of their own, and whose class comes at least twice.

    Returns:
        An empty list where nothing repeats.

    Raises:
        ModelError: Where `blocks()` returns something that is not a part of the model.
    """
    answer = getattr(model, "blocks", None)
    if callable(answer) and not isinstance(answer, nn.Module):  # many a model has a part of that name
        return _answered_blocks(model, answer())
    candidates = list(_outermost_members(model, "", set()))
    counts = Counter(type(module) for _, module in candidates)
    return [(name, module) for name, module in candidates if counts[type(module)] > 1]


def _answered_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    names = {module: name for name, module in model.named_modules()}
    strangers = [type(block).__name__ for block in blocks if block not in names]
    if strangers:
        raise ModelError(
            f"blocks() of {type(model).__name__} returned what is no part of it: {', '.join(strangers[:3])}",
            remedy="return submodules of the model, in the order in which they run",
        )
    return [(names[block], block) for block in dict.fromkeys(blocks)]


def _outermost_members(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Members of containers that could be blocks, by name; a module used twice comes once."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if child in seen:
            continue
        seen.add(child)
        if isinstance(module, _CONTAINERS) and _could_be_block(child):
            yield path, child
        else:
            yield from _outermost_members(child, f"{path}.", seen)


def _could_be_block(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None
    return has_parts and type(module) not in _CONTAINERS and next(module.parameters(), None) is not None


def without_shared_parameters(
    model: nn.Module, blocks: Sequence[nn.Module], ignored: Collection[Tensor] = ()
) -> list[nn.Module]:
    """The blocks that share no parameter with another part of the model.

    Args:
        model: The whole.
        blocks: Its repeated parts.
        ignored: Parameters that may be shared.
    """
    places = Counter(_parameters_outside(model, set(blocks)))
    for block in blocks:
        places.update({*block.parameters()})
    return [block for block in blocks if all(places[p] == 1 or p in ignored for p in block.parameters())]


def _parameters_outside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters that are reached without going through a block, each once."""
    found = set(module.parameters(recurse=False))
    for child in module.children():
        if child not in blocks:
            found.update(_parameters_outside(child, blocks))
    return iter(found)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own, and those whose class name ends in `Norm`."""
    return isinstance(module, _NORMS) or bool(_NORM_BY_NAME.search(type(module).__name__))


def norm_and_bias(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone by convention.

    These are the parameters of normalisation modules (torch's, and those whose class name ends in `Norm`),
    biases, and everything of fewer than two dimensions.
    """
    in_norms = {
        parameter for module in model.modules() if is_norm(module) for parameter in module.parameters(recurse=False)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter in in_norms or parameter.ndim < 2 or name.endswith("bias")
    }


def sees_whole_batch(model: nn.Module) -> bool:
    """Whether a BatchNorm, synchronised or not, normalises by the batch: what only fills it up would count, too."""
    return any(isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats) for m in model.modules())


def batchnorm_over_batch(model: nn.Module) -> list[str]:
    """Names of the BatchNorm modules that, as they stand, normalise by this process's own batch.

    Synchronised ones do not, nor do those that have running statistics and are in evaluation mode.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and (module.training or not module.track_running_stats)
    ]
