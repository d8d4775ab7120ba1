"""Where DeepSpeed ZeRO keeps this rank's part of each parameter: flat slices of float32 masters.

Every stage lays the trained parameters of an optimizer group end to end and cuts the whole into equal slices, one a
rank. Stages 1 and 2 cut the group, stage 3 each parameter. What is read here is DeepSpeed's own bookkeeping, none of
it public: the contract tests hold it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.state import Box, boxes_of_slice, whole


@dataclass(frozen=True)
class Slice:
    """This rank's part of one parameter.

    Attributes:
        start: Its first element in the flattened parameter.
        numel: How many elements it has.
        flat: The tensor that the optimizer updates, of which the master is a part.
        offset: Where in `flat` it begins.
    """

    start: int
    numel: int
    flat: Tensor
    offset: int

    def parts(self, shape: tuple[int, ...], values: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The slice of `values`, which is laid out as `flat` is, as boxes of the parameter and views of the memory."""
        if not self.numel and 0 in shape:
            yield whole(shape), values[:0].view(shape)
        for box, position in boxes_of_slice(shape, self.start, self.start + self.numel):
            view = values.narrow(0, self.offset + position - self.start, torch.Size(box.size).numel())
            yield box, view.view(box.size)


class Slices:
    """The slices of stages 1 and 2.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        weights: The trained parameters by name.
    """

    def __init__(self, zero: Any, weights: Mapping[str, nn.Parameter]) -> None:
        self._zero = zero
        group_of = {n: position for position, group in enumerate(zero.optimizer.param_groups) for n in group["names"]}
        self.by_name = {name: self._slice(p, group_of[name]) for name, p in weights.items()}

    def _slice(self, p: Any, group: int) -> Slice:
        if not p.numel() or p._hp_mapping is None:  # DeepSpeed leaves out what is empty; or all of it is elsewhere
            return Slice(0, 0, self._flats()[group], 0)  # its group's: a step counter is the whole group's
        model, master = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        return Slice(model.start, master.numel, self._flats()[p._hp_mapping.param_group_index], master.start)

    def _flats(self) -> list[Tensor]:
        # BF16_Optimizer has another name for them.
        is_bf16 = hasattr(self._zero, "fp32_groups_flat_partition")
        flats = self._zero.fp32_groups_flat_partition if is_bf16 else self._zero.single_partition_of_fp32_groups
        return list(flats)

    def write_through(self) -> None:
        """Let the model's parameters follow the masters. Every rank must call it."""
        self._zero.update_lp_params()


class ShardedSlices:
    """The slices of stage 3, where the model's own parameters are cut up as well.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        weights: The trained parameters by name.
        rank: This rank.
    """

    def __init__(self, zero: Any, weights: Mapping[str, nn.Parameter], rank: int) -> None:
        self._zero, self._rank = zero, rank
        self.by_name = {name: self._slice(p) for name, p in weights.items()}

    def _slice(self, p: Any) -> Slice:
        sub_group, offset, _ = self._zero.grad_position[self._zero.get_param_id(p)]
        start, numel = partition_of(p, self._rank)
        return Slice(start, numel, self._zero.fp32_partitioned_groups_flat[sub_group], offset)

    def write_through(self) -> None:
        """Let the model's parameters follow the masters. Every rank must call it."""
        for sub_group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        persistent = self._zero.persistent_parameters  # small ones, which every rank holds whole
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def partition_of(p: Any, rank: int) -> tuple[int, int]:
    """The first element and the length of a rank's part of a parameter of stage 3, without its padding."""
    size = p.partition_numel()
    start = rank * size
    return min(start, p.ds_numel), max(0, min(size, p.ds_numel - start))
