"""The contract of an engine, and what the engines built on torch alone share.

An engine owns the model, the optimizer and the communication between ranks. It knows no loop, no data and no files:
it is given sums of losses and says what a step did. `state()` and `load()` speak of named pieces, never of the
engine's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bigtrain.dist import World
from bigtrain.engines import slots
from bigtrain.engines.answers import checked, refuse_without_gradient
from bigtrain.engines.casting import Casting
from bigtrain.engines.sums import DeviceSums, HostSums, StepResult, in_chunks
from bigtrain.errors import CombinationError
from bigtrain.optim import OptimizerPlan
from bigtrain.protocols import LossSum
from bigtrain.state import BUFFER, WEIGHT, Box, EngineState, Piece, Reader, TensorSpec, whole

Fill = Callable[[Sequence[Piece]], None]


class Evaluator(Protocol):
    """Has a model to evaluate."""

    @property
    def model(self) -> nn.Module:
        """Call it for forward."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients."""


class Engine(Protocol):
    """Spreads one training over processes."""

    name: str
    model: nn.Module  # call it for forward

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one microbatch; communication may wait for the last one of a step."""

    def backward(self, result: LossSum) -> None:
        """Add the gradient of this microbatch's sum of losses, and the sum itself, to the step's."""

    def step(self, lr_scale: float) -> StepResult:
        """Divide by the targets of the whole global batch, clip, update, zero. Every rank must call it.

        Args:
            lr_scale: The schedule's factor on every group's own rate.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients; training goes on afterwards as if nothing had been."""

    def state(self) -> EngineState:
        """Views of this rank's pieces. Nothing is copied, and no rank waits for another."""

    def load(self, reader: Reader) -> None:
        """Fill those pieces in place. Every rank must call it.

        Raises:
            StateError: Listing everything that is missing, extra or misshapen; nothing has been changed then.
        """

    def follow(self) -> None:
        """Let what is computed with follow the pieces, whose memory has been written to. Every rank must call it."""

    def close(self) -> None:
        """Let go of everything: after it, nothing of the engine is left in the process."""


@dataclass(frozen=True)
class Zero:
    """What the run file says to DeepSpeed.

    Attributes:
        stage: What is cut up over the ranks: 1 the optimizer's state, 2 gradients as well, 3 weights as well.
        offload_optimizer: Keep the optimizer's state and the master weights on the host, and update there.
        offload_params: Keep weights on the host, in stage 3.
        extra: Further keys of DeepSpeed's own configuration.
    """

    stage: int = 3
    offload_optimizer: bool = False
    offload_params: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """What the run file says to an engine.

    Attributes:
        clip_grad_norm: The largest norm a gradient may have; None leaves it.
        shard_size: Ranks that share one copy of the model; None means all.
        reshard_after_forward: Give back a block's gathered parameters between forward and backward.
        cpu_offload: Keep shards on the host.
        fill: Gives initial values to the pieces of a model that was built on the meta device.
        compute_dtype: What forward and backward compute in, where that is not the parameters' own.
        zero: What only the deepspeed engine reads.
        compiled_blocks: Blocks whose forward torch.compile has: no hook may be put inside.
        recomputes: Whether activations are computed again in backward.
    """

    clip_grad_norm: float | None = None
    shard_size: int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    fill: Fill | None = None
    compute_dtype: torch.dtype | None = None
    zero: Zero = field(default_factory=Zero)
    compiled_blocks: Sequence[nn.Module] = ()
    recomputes: bool = False


@dataclass(frozen=True)
class Held:
    """A parameter or persistent buffer as this rank holds it.

    Attributes:
        tensor: What the module holds; a DTensor where it is sharded.
        shape: The full tensor's shape.
        box: The part that is here.
        is_owner: Whether this rank stands for that part.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    box: Box
    is_owner: bool

    @property
    def local(self) -> Tensor:
        """The memory itself, of the box's size."""
        return slots.local(self.tensor)


class TorchEngine:
    """The arithmetic of a step for models whose parameters are plain tensors or DTensors.

    A subclass says how the model is wrapped (`model`), where the parts lie (`_held`), and how sums travel.

    Args:
        plain: The module whose names count.
        wrapped: What is called for forward.
        plan: The optimizer to build.
        world: This rank's place.
        choices: What the run file says.
    """

    name = "?"

    def __init__(
        self, plain: nn.Module, wrapped: nn.Module, plan: OptimizerPlan, world: World, choices: Choices
    ) -> None:
        self.model = wrapped
        self._plain = plain
        self._world = world
        self._weights = {name: self._held(p, i) for i, (name, p) in enumerate(plain.named_parameters())}
        self._buffers = {name: self._held(b, i) for i, (name, b) in enumerate(persistent_buffers(plain).items())}
        if choices.fill:
            choices.fill(self.weight_pieces())
        self._casting: Casting | None = None
        if choices.compute_dtype is not None:
            self._casting = Casting(plain, choices.compute_dtype, self._parameters_to_cast())
        self._trained = [name for group in plan.groups for name in group.names]
        self._updated = self._tensors_to_update(plan)
        self._optimizer = plan.build(self._updated)
        self._plan = plan
        slots.zero_momentum(self._optimizer)
        clip = choices.clip_grad_norm
        on_host = world.device.type == "cpu"
        self._sums = HostSums(clip, alone=world.size == 1) if on_host else DeviceSums(world.device, clip)
        kinds = {(p.device.type, p.dtype) for p in self._updated.values()}
        self._is_uniform = len(kinds) == 1
        self._skips_on_device = plan.fusable and all(device != "cpu" for device, _ in kinds)
        # The kernels divide by grad_scale too, but read it as float32: float64 gradients are divided beforehand.
        self._divides_in_kernel = plan.fusable and all(dtype != torch.float64 for _, dtype in kinds)

    # ---- what a subclass may change ----------

    def _held(self, tensor: Tensor, position: int) -> Held:
        """Where the parts of a tensor lie; replicated tensors are owned in turn, to spread the writing of them."""
        return Held(tensor, tuple(tensor.shape), whole(tensor.shape), position % self._world.size == self._world.rank)

    def _parameters_to_cast(self) -> list[Tensor]:
        """The parameters of which copies are computed with."""
        return [held.tensor for held in self._weights.values()]

    def _tensors_to_update(self, plan: OptimizerPlan) -> dict[str, Tensor]:
        """The tensors the optimizer sees, by name."""
        return {name: self._weights[name].tensor for name in self._trained}

    def _collect_gradients(self) -> list[Tensor]:
        """Local gradients of the step, after all communication of them."""
        return [p.grad for p in self._updated.values() if p.grad is not None]

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        """This rank's part of the squared norm of the whole gradient sum, such that the ranks' parts add up to it."""
        chunks = in_chunks(gradients)
        if not (chunks and self._is_uniform):
            return get_total_norm(chunks).double().square()
        norms = torch.stack(torch._foreach_norm(chunks))
        squared: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64).square()
        return squared

    def _reduce(self, sums: Tensor) -> Tensor:
        """Add up over ranks: squared norm, loss, count."""
        return sums

    def _communicating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one microbatch: what is sent, and when."""
        return nullcontext()

    def _run_backward(self, total: Tensor) -> None:
        total.backward()  # type: ignore[no-untyped-call]

    def _run_optimizer(self) -> None:
        self._optimizer.step()

    def _zero(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _after_evaluation(self) -> None:
        """Undo what evaluation forwards leave behind."""

    # ---- the contract ----------

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one microbatch."""
        with self._communicating(last=last), self._copies():
            yield

    def _copies(self) -> AbstractContextManager[None]:
        return self._casting.copies() if self._casting else nullcontext()

    def backward(self, result: LossSum) -> None:
        """Add the gradient of this microbatch's sum of losses, and the sum itself, to the step's."""
        try:
            self._run_backward(checked(result).total)
        except (AttributeError, RuntimeError):
            refuse_without_gradient(result)
            raise
        self._sums.add(result)

    @torch.no_grad()
    def step(self, lr_scale: float) -> StepResult:
        """Divide by the targets of the whole global batch, clip, update, zero."""
        gradients = self._collect_gradients()
        result, divisor = self._sums.weigh(self._squared_norm(gradients), self._reduce)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self._update(gradients, divisor, result.skipped)
        self._zero()
        return result

    def _update(self, gradients: list[Tensor], divisor: Tensor | float, skipped: Tensor | bool) -> None:
        if self._skips_on_device:
            # torch's fused kernels skip where found_inf is 1, and nobody waits.
            self._optimizer.found_inf = torch.as_tensor(skipped, dtype=torch.float32)  # type: ignore[attr-defined]
        elif skipped:
            return
        if self._divides_in_kernel:
            scale = torch.as_tensor(divisor, dtype=torch.float32)
            # To parameters on the host torch would fetch it without waiting for it.
            self._optimizer.grad_scale = scale if self._skips_on_device else scale.cpu()  # type: ignore[attr-defined]
        elif isinstance(divisor, float):
            torch._foreach_div_(gradients, divisor)
        else:
            torch._foreach_div_(gradients, divisor.to(gradients[0].device))
        self._run_optimizer()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        nn.Module.train(self.model, False)  # not by its own eval(): DeepSpeed's leaves the engine's own flag
        try:
            with torch.no_grad(), self._copies():
                yield
        finally:
            nn.Module.train(self.model)
            self._after_evaluation()

    def state(self) -> EngineState:
        """Views of this rank's pieces."""
        pieces = self.weight_pieces()
        for name in self._trained:
            held = self._weights[name]
            pieces += slots.pieces(self._optimizer, self._updated[name], name, held.shape, held.box, held.is_owner)
        return EngineState(pieces, slots.hyper(self._optimizer))

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Fill the pieces in place."""
        weights = self.weight_pieces()
        slots.check(reader, {p.key: TensorSpec(p.shape, p.dtype) for p in weights}, self._trained)
        for piece in weights:
            reader.read_into(piece.kind, piece.name, piece.box, piece.data)
        for name in self._trained:
            slots.load(self._optimizer, self._updated[name], name, self._weights[name].box, reader, self._plan)
        slots.zero_momentum(self._optimizer)
        slots.set_hyper(self._optimizer, reader.hyper)

    def follow(self) -> None:
        """Nothing: it computes with the pieces themselves."""

    def close(self) -> None:
        """Let go of everything."""
        if self._casting:
            self._casting.remove()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        for attribute in ("model", "_plain", "_weights", "_buffers", "_updated"):
            delattr(self, attribute)

    def weight_pieces(self) -> list[Piece]:
        """The pieces of weights and buffers, without the optimizer's."""
        pieces = [self._piece(name, WEIGHT, held) for name, held in self._weights.items()]
        return pieces + [self._piece(name, BUFFER, held) for name, held in self._buffers.items()]

    def _piece(self, name: str, kind: str, held: Held) -> Piece:
        local = held.local.detach()
        return Piece(name, kind, held.shape, local.dtype, held.box, local, held.is_owner)


def take_no_part(engine: str, names: Sequence[str]) -> CombinationError:
    """The error for trained parameters without a gradient, which an engine cannot leave alone."""
    shown = ", ".join(names[:5]) + (f" … ({len(names)} in all)" if len(names) > 5 else "")
    return CombinationError(
        f"the engine {engine} needs a gradient of every trained parameter, and these take no part in the loss: {shown}",
        where="model",
        remedy="if they never do, freeze them (finetune.freeze): results stay the same; or set engine.name to fsdp;\n"
        "if they do on some ranks or in some steps only, add what they give, times zero, to the loss",
    )


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, by name; those computed anew (rotary tables, masks) do not."""
    kept: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in child._non_persistent_buffers_set:
                kept[name] = buffer
    return kept
