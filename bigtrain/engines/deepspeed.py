"""DeepSpeed ZeRO, stages 0 to 3: its communication, its partitions, its offloading; our optimizer and arithmetic.

Gradients are sums over ranks, as under every engine. What they are divided by is known at the step, and reaches
DeepSpeed as the loss scale that it divides by anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.dist import World
from bigtrain.engines import slots
from bigtrain.engines.answers import checked, refuse_without_gradient
from bigtrain.engines.base import Choices, TorchEngine, persistent_buffers, take_no_part
from bigtrain.engines.casting import Casting
from bigtrain.engines.deepspeed_library import SumsWithNorms, destroy, host_adam, initialize, partition_meta
from bigtrain.engines.sums import EarlySums, StepResult
from bigtrain.engines.zero_slices import ShardedSlices, Slice, Slices, partition_of
from bigtrain.errors import StateError
from bigtrain.optim import OptimizerPlan
from bigtrain.protocols import LossSum
from bigtrain.state import BUFFER, WEIGHT, EngineState, MemoryReader, Piece, Reader, TensorSpec, whole


class StageZeroEngine(TorchEngine):
    """Stage 0: every rank holds everything, and DeepSpeed sums the gradients."""

    name = "deepspeed"

    def __init__(self, model: nn.Module, plan: OptimizerPlan, world: World, choices: Choices) -> None:
        super().__init__(model, model, plan, world, choices)
        self._deepspeed = initialize(model, self._optimizer, world, choices)
        self.model = self._deepspeed
        self._parts = _Participation(model)

    def _communicating(self, *, last: bool) -> AbstractContextManager[Any]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _run_backward(self, total: Tensor) -> None:
        self._deepspeed.backward(total)

    def _collect_gradients(self) -> list[Tensor]:
        self._parts.check()
        return super()._collect_gradients()

    def _reduce(self, sums: Tensor) -> Tensor:
        # The gradient is the same on every rank already; loss and count are not.
        self._world.sum_of_step(sums[1:])
        return sums

    def _run_optimizer(self) -> None:
        self._deepspeed.step()

    def close(self) -> None:
        """Let go of everything."""
        super().close()
        destroy(self._deepspeed)
        del self._deepspeed


class ZeroEngine:
    """Stages 1 to 3: each rank updates its slices of float32 masters, and the model follows them.

    Args:
        model: The plain module with its initial values.
        plan: The optimizer to build.
        world: This rank's place.
        choices: What the run file says.
    """

    name = "deepspeed"

    def __init__(self, model: nn.Module, plan: OptimizerPlan, world: World, choices: Choices) -> None:
        self._plain, self._world, self._plan = model, world, plan
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if choices.fill:
            partition_meta(model, world, choices)
        weights = dict(model.named_parameters())
        self._trained = {name: weights[name] for group in plan.groups for name in group.names}
        self._frozen = {name: p for name, p in weights.items() if name not in self._trained}
        # DeepSpeed makes the masters out of weights that it has rounded to bf16 already.
        has_masters = choices.compute_dtype is not None
        keeps = has_masters and not choices.fill
        exact = {name: p.detach().to("cpu", copy=True) for name, p in weights.items()} if keeps else {}
        self._casting = Casting(model, choices.compute_dtype, ()) if choices.compute_dtype else None
        optimizer = host_adam(plan, weights) if choices.zero.offload_optimizer else plan.build(weights)
        self.model = self._deepspeed = initialize(model, optimizer, world, choices)
        self._optimizer = optimizer
        self._counts_in_int = choices.zero.offload_optimizer
        self._zero = self._deepspeed.optimizer
        is_sharded = choices.zero.stage == 3
        made = ShardedSlices(self._zero, self._trained, world.rank) if is_sharded else Slices(self._zero, self._trained)
        self._slices: ShardedSlices | Slices = made
        self._frozen_parts = {name: self._frozen_part(p, has_masters) for name, p in self._frozen.items()}
        slots.zero_momentum(optimizer)
        if choices.fill:
            choices.fill(self._weight_pieces())
        elif exact:
            self._read_weights(MemoryReader({(WEIGHT, name): tensor for name, tensor in exact.items()}, {}))
        if has_masters or choices.fill:
            self._write_through()
        self._sums = self._make_sums(choices)
        self._is_last = True
        self._parts = _Participation(model)

    def _make_sums(self, choices: Choices) -> SumsWithNorms | EarlySums:
        if SumsWithNorms.serve(self._zero, self._world, choices):
            return SumsWithNorms(self._zero, self._world.sum_of_step)
        return EarlySums(self._world.device, self._world.start_sum_of_step)

    def _frozen_part(self, p: Any, has_masters: bool) -> tuple[int, Tensor]:
        """This rank's part of a frozen parameter: its first element, and the memory, a float32 master in bf16."""
        if not hasattr(p, "ds_tensor"):
            held = p.detach().view(-1)
            return 0, held.float() if has_masters else held
        start, numel = partition_of(p, self._world.rank)
        held = p.ds_tensor.detach().narrow(0, 0, numel)
        return start, held.float() if has_masters else held

    def _read_weights(self, reader: Reader) -> None:
        for piece in self._weight_pieces():
            if (piece.kind, piece.name) in reader.index:
                reader.read_into(piece.kind, piece.name, piece.box, piece.data)

    def _write_through(self) -> None:
        """Let what is computed with follow the masters."""
        for name, p in self._frozen.items():
            held, values = getattr(p, "ds_tensor", p).detach(), self._frozen_parts[name][1]
            held.view(-1)[: values.numel()].copy_(values)
        self._slices.write_through()

    # ---- the contract ----------

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one microbatch."""
        self._is_last = last
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, result: LossSum) -> None:
        """Add the gradient of this microbatch's sum of losses, and the sum itself, to the step's."""
        try:
            self._sums.add(checked(result), last=self._is_last)
            self._deepspeed.backward(_poisoned_if_not_finite(result.total))
        except (AttributeError, AssertionError, RuntimeError):
            refuse_without_gradient(result)
            raise

    def step(self, lr_scale: float) -> StepResult:
        """Divide by the targets of the whole global batch, clip, update, zero."""
        self._parts.check()
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        if isinstance(self._sums, SumsWithNorms):
            self._deepspeed.step()
            loss, norm = self._sums.finish()
        else:
            loss, count = self._sums.finish()
            with self._divided_by(count):
                self._deepspeed.step()
            norm = float(self._deepspeed.get_global_grad_norm())
        return StepResult(loss, norm, not math.isfinite(norm))

    @contextmanager
    def _divided_by(self, count: float) -> Iterator[None]:
        zero = self._zero
        if not hasattr(zero, "loss_scaler"):  # BF16_Optimizer scales no loss
            torch._foreach_div_(zero.fp32_groups_gradients_flat, count)
            yield
            return
        zero.loss_scaler.cur_scale = count
        try:
            yield
        finally:
            zero.loss_scaler.cur_scale = 1.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        nn.Module.train(self.model, False)  # not by its own eval(), which leaves the engine's own flag
        try:
            with torch.no_grad():
                yield
        finally:
            nn.Module.train(self.model)

    def state(self) -> EngineState:
        """Views of this rank's pieces."""
        pieces = self._weight_pieces()
        for position, (name, part) in enumerate(self._slices.by_name.items()):
            for kind, value in self._slots_of(part.flat).items():
                if value.ndim > 0:
                    pieces += self._pieces_of(name, kind, part, value, position)
                else:
                    # A counter lies on every rank: the one that holds the first element stands for it.
                    owner = (
                        self._owns(name, position) and part.start == 0 and bool(part.numel or 0 in self._shapes[name])
                    )
                    pieces.append(Piece(name, kind, (), value.dtype, whole(()), value, owner))
        return EngineState(pieces, slots.hyper(self._optimizer))

    def _slots_of(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state.get(flat, {})
        # DeepSpeed's Adam counts in an int, of which this is a copy.
        counted = {kind: torch.tensor(float(value)) for kind, value in state.items() if isinstance(value, int)}
        return {kind: value for kind, value in state.items() if isinstance(value, Tensor)} | counted

    def _weight_pieces(self) -> list[Piece]:
        pieces = []
        for position, (name, part) in enumerate(self._slices.by_name.items()):
            pieces += self._pieces_of(name, WEIGHT, part, part.flat.detach(), position)
        for position, name in enumerate(self._frozen):
            start, values = self._frozen_parts[name]
            part = Slice(start, values.numel(), values, 0)
            pieces += self._pieces_of(name, WEIGHT, part, values, position)
        for position, (name, buffer) in enumerate(persistent_buffers(self._plain).items()):
            shape = tuple(buffer.shape)
            owner = position % self._world.size == self._world.rank
            pieces.append(Piece(name, BUFFER, shape, buffer.dtype, whole(shape), buffer, owner))
        return pieces

    def _pieces_of(self, name: str, kind: str, part: Slice, values: Tensor, position: int) -> list[Piece]:
        shape, owner = self._shapes[name], self._owns(name, position)
        return [Piece(name, kind, shape, values.dtype, box, data, owner) for box, data in part.parts(shape, values)]

    def _owns(self, name: str, position: int) -> bool:
        """Whether this rank stands for its part: slices are there once; what is whole, on every rank."""
        is_whole = 0 in self._shapes[name] or (name in self._frozen and not hasattr(self._frozen[name], "ds_tensor"))
        return not is_whole or position % self._world.size == self._world.rank

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Fill the pieces in place."""
        masters = {(WEIGHT, name): TensorSpec(shape, torch.float32) for name, shape in self._shapes.items()}
        buffers = {
            (BUFFER, name): TensorSpec(tuple(b.shape), b.dtype) for name, b in persistent_buffers(self._plain).items()
        }
        slots.check(reader, masters | buffers, self._trained)
        self._read_weights(reader)
        self._load_slots(reader)
        slots.zero_momentum(self._optimizer)
        slots.set_hyper(self._optimizer, reader.hyper)
        self._write_through()

    def _load_slots(self, reader: Reader) -> None:
        for part in self._slices.by_name.values():
            self._optimizer.state.pop(part.flat, None)
        kinds = {kind for kind, _ in reader.index} - {*slots.NOT_SLOTS}
        for name, part in self._slices.by_name.items():
            state = self._optimizer.state[part.flat]
            for kind in kinds:
                spec = reader.index.get((kind, name))
                if spec is None:
                    continue
                if kind == "step":
                    self._load_counter(reader, kind, name, spec.dtype, state)
                    continue
                if kind not in state:
                    dtype = self._plan.dtype_of_slot(part.flat.dtype, spec.dtype)
                    state[kind] = torch.zeros_like(part.flat, dtype=dtype, requires_grad=False)
                for box, data in part.parts(self._shapes[name], state[kind]):
                    reader.read_into(kind, name, box, data)

    def _load_counter(self, reader: Reader, kind: str, name: str, dtype: torch.dtype, state: dict[str, Any]) -> None:
        value = torch.zeros((), dtype=dtype)
        reader.read_into(kind, name, whole(()), value)
        mine = int(value) if self._counts_in_int else value
        before = state.setdefault(kind, mine)
        if float(before) != float(value):
            raise StateError(
                f"{kind} of {name} is {float(value):g}, and of another parameter of its group {float(before):g}:\n"
                "DeepSpeed keeps one for a whole group",
                remedy="set engine.name to fsdp, which keeps one for each parameter",
            )

    def follow(self) -> None:
        """Let the weights follow the masters, which have been written to."""
        self._write_through()

    def close(self) -> None:
        """Let go of everything."""
        if self._casting:
            self._casting.remove()
        deepspeed, optimizer = self._deepspeed, self._optimizer
        for attribute in list(vars(self)):
            delattr(self, attribute)
        destroy(deepspeed)  # goes through the optimizer's groups
        optimizer.state.clear()
        optimizer.param_groups.clear()


def _poisoned_if_not_finite(total: Tensor) -> Tensor:
    """A loss with the same gradient, or with none that is finite where the loss is not.

    DeepSpeed leaves out a step whose gradients are not finite; a loss that is not is to be left out, too.
    """
    if total.device.type == "cpu":
        return total if math.isfinite(total.item()) else total * math.nan
    return total * torch.where(total.detach().isfinite(), 1.0, math.nan)


class _Participation:
    """Refuses parameters that take no part in the loss: DeepSpeed would decay them, and torch leaves them alone.

    It watches the first step alone: hooks on every parameter cost too much for more.
    """

    def __init__(self, model: nn.Module) -> None:
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if p.requires_grad}
        self._missing = {name for name, size in sizes.items() if size}
        self._handles = [
            p.register_hook(lambda gradient, name=name: self._missing.discard(name))  # type: ignore[no-untyped-call]
            for name, p in model.named_parameters()
            if p.requires_grad
        ]

    def check(self) -> None:
        """End the first step; nothing in any other.

        Raises:
            CombinationError: Naming the parameters.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._missing:
            raise take_no_part("deepspeed", sorted(self._missing))
