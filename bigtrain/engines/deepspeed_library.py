"""DeepSpeed itself: imported, started, let go of. What it keeps to itself is touched here alone."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.dist import World
from bigtrain.engines.base import Choices
from bigtrain.engines.deepspeed_config import build_config
from bigtrain.engines.sums import at_least_something, sum_of_squares
from bigtrain.errors import SetupError
from bigtrain.optim import OptimizerPlan
from bigtrain.protocols import LossSum

_TESTED = "install a version that bigtrain is tested with: 0.19.3 to 0.19.8"
_FORMER_NAMES = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, choices: Choices) -> Any:
    """DeepSpeed's engine around a model and an optimizer, set so that it sums gradients. Every rank must call it.

    Raises:
        SetupError: Where this version of DeepSpeed would not compute what is meant.
    """
    library = _library(world)
    stage = choices.zero.stage
    # A model that has been partitioned already is not broadcast.
    scalars: list[Any] = [p for p in model.parameters() if p.ndim == 0 and not hasattr(p, "ds_id")]
    for p in scalars:
        p.ds_optim_param = True  # "not to be broadcast": it cannot view a scalar as bytes, nor has it to
        if stage == 3:
            p.data = p.data.view(1)
    if stage == 3:
        for block in choices.compiled_blocks:  # gathered as one: no hooks between its parts
            library.utils.set_z3_leaf_module(block, True)
    with _quiet():
        engine, *_ = library.initialize(
            model=model, optimizer=optimizer, config=build_config(choices), dist_init_required=False
        )
    for p in scalars:
        del p.ds_optim_param
        if stage == 3:
            p.ds_shape = torch.Size([])
    if stage == 3:
        if not hasattr(engine.optimizer, "_gradient_averaging_world_size"):
            raise _takes_means()
        # Its configuration knows no sum for stage 3.
        engine.optimizer._gradient_averaging_world_size = lambda params, world_size: 1
    elif engine.gradient_average:
        raise _takes_means()
    return engine


def partition_meta(model: nn.Module, world: World, choices: Choices) -> None:
    """Give a model on the meta device memory for this rank's part of each parameter, one parameter at a time.

    The values are whatever lay there. Ties survive. Every rank must call it.
    """
    library = _library(world)
    config = build_config(choices)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if p not in made:
                made[p] = nn.Parameter(
                    torch.empty(p.shape or (1,), dtype=choices.compute_dtype or p.dtype, device=world.device),
                    requires_grad=p.requires_grad,
                )
                with _quiet():
                    library.zero.Init(
                        nn.ParameterList([made[p]]), mem_efficient_linear=False, config_dict_or_path=config
                    )
                if p.ndim == 0:
                    made[p].ds_shape = torch.Size([])  # type: ignore[attr-defined]
            module._parameters[name] = made[p]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=world.device)


def host_adam(plan: OptimizerPlan, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for the host, compiled at its first use, with the groups and hyperparameters of torch's."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = plan.build(tensors).param_groups
    with _quiet():
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=plan.cls is torch.optim.AdamW)
    return made


class SumsWithNorms:
    """Loss, count and the norms of the gradients in one message, where DeepSpeed sends one for each group.

    The count is what the gradients are divided by: DeepSpeed asks for the norms first, and divides by the loss scale
    after that. For a host, stages 1 to 3, nothing offloaded.

    Args:
        zero: DeepSpeed's optimizer, whose way to sum norms is replaced.
        reduce: Sums a tensor over all ranks, in place.
    """

    def __init__(self, zero: Any, reduce: Callable[[Tensor], Tensor]) -> None:
        self._zero, self._reduce = zero, reduce
        self._loss = self._count = 0.0
        self._result: tuple[float, float] | None = None
        self._norms: list[Tensor] = []
        zero.get_grad_norm_direct = self._next_norm

    @staticmethod
    def serve(zero: Any, world: World, choices: Choices) -> bool:
        """Whether DeepSpeed's optimizer is of the kind whose messages are known."""
        kinds = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
        is_offloaded = choices.zero.offload_optimizer or choices.zero.offload_params
        is_known = type(zero).__name__ in kinds and hasattr(zero, "get_grad_norm_direct")
        return is_known and world.device.type == "cpu" and not is_offloaded

    def add(self, result: LossSum, *, last: bool) -> None:
        """Add a microbatch."""
        self._loss += result.total.item()
        self._count += float(result.count)

    def finish(self) -> tuple[float, float]:
        """After DeepSpeed's step: the mean loss over all ranks, and the norm of its gradient, before clipping.

        Raises:
            SetupError: Where the step did without the norms, so that nothing was divided.
        """
        result, self._result = self._result, None
        self._zero.loss_scaler.cur_scale = 1.0
        if result is None:
            raise SetupError(
                f"DeepSpeed {_version()} took a step without asking for the norm of the gradients",
                where="engine.name",
                remedy=_TESTED,
            )
        return result

    def _next_norm(self, gradients: Any, params: Any, norm_type: float = 2.0) -> Tensor:
        """The norm of the next group of gradients, over all ranks; -1 where it is not finite."""
        if not self._norms:
            self._send()
        return self._norms.pop(0)

    def _send(self) -> None:
        groups = self._zero.averaged_gradients  # by number
        squares = [sum_of_squares(groups[i]) for i in range(len(groups))]
        sums = torch.tensor([*squares, self._loss, self._count], dtype=torch.float64)
        *squares, loss, count = self._reduce(sums).tolist()
        self._loss = self._count = 0.0
        divisor = at_least_something(count)
        self._zero.loss_scaler.cur_scale = divisor
        self._result = loss / divisor, math.sqrt(math.fsum(squares)) / divisor
        self._norms = [torch.tensor(math.sqrt(square) if math.isfinite(square) else -1.0) for square in squares]


def destroy(engine: Any) -> None:
    """Let go of an engine and its module: DeepSpeed keeps both of stage 3 alive by itself."""
    module = engine.module
    coordinator = _coordinator(engine.optimizer)
    with _quiet():
        engine.destroy()
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [kept for kept in stack if kept is not module]
    if coordinator is not None:
        _clear_caches(type(coordinator))
    del engine, coordinator
    gc.collect()  # what is left refers to itself in circles


def _coordinator(zero: Any) -> Any:
    offload = getattr(zero, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()


def _clear_caches(cls: type) -> None:
    """Empty every cache that a method of the class closes over."""
    for member in vars(cls).values():
        for cell in getattr(member, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _library(world: World) -> Any:
    if world.device.type == "cpu":
        # Read once, at the import: on a machine with GPUs it would take those.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    with _quiet():
        import deepspeed
    # torch 2.14 renames collectives that DeepSpeed calls in every step; nobody but DeepSpeed can do anything about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its kernels for ranks of one machine serve inference alone, and would be compiled at the first start.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    name = deepspeed.accelerator.get_accelerator()._name
    if name != world.device.type:
        raise SetupError(
            f"DeepSpeed has been imported for {name}, and this run computes on {world.device.type}",
            where="engine.device",
            remedy="start it in a process of its own, or set DS_ACCELERATOR before the first import of deepspeed",
        )
    _forget_former_group(deepspeed, world)
    # torch 2.14 has new names for what DeepSpeed calls some hundred times a step.
    warnings.filterwarnings("ignore", _FORMER_NAMES, FutureWarning)
    return deepspeed


_group_of_last_engine: Any = None


def _forget_former_group(deepspeed: Any, world: World) -> None:
    """DeepSpeed remembers the process group of its first engine, which may be gone: a notebook trains twice."""
    global _group_of_last_engine
    if world.group is _group_of_last_engine:
        return
    _group_of_last_engine = world.group
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's own reports: they go to the log of whoever wants them (logging, DeepSpeed)."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _takes_means() -> SetupError:
    return SetupError(
        f"DeepSpeed {_version()} takes means over ranks where sums are needed", where="engine.name", remedy=_TESTED
    )


def _version() -> str:
    return importlib.metadata.version("deepspeed")
