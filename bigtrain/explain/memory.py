"""How many bytes of weights, gradients and optimizer state one rank holds, under every engine: formulas.

Every number is that of the rank that holds most, which is rank 0. Tests hold them against what the engines have in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bigtrain.config import schema
from bigtrain.explain.parts import OptimizerSlots, Parameter, Parts

# DeepSpeed's documentation of `stage3_max_live_parameters`: parameters gathered at once, before any is given back.
_MOST_LIVE_PARAMETERS = 10**9
# ZeRO pads a group so that each rank's slice begins at an even element (`nccl_start_alignment_factor` in its
# stage_1_and_2.py).
_SLICE_ALIGNMENT = 2
_FP32_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """What one rank holds under one engine, in bytes.

    Attributes:
        engine: As in the run file.
        setting: What besides its name decides: the stage, or how many ranks share a copy; empty where nothing does.
        world_size: How many ranks there are.
        weights: Parameters as they lie between steps.
        masters: fp32 parameters that are updated, where they are not the weights themselves.
        working: What parameters take besides while a microbatch is computed: copies, or what is gathered of them.
        gradients: When backward is done.
        optimizer: The optimizer's state; None where it could not be found out.
        buffers: Of the model.
        on_host: Which of these lie in the host's memory.
        refusal: Why the engine would refuse, if it would; nothing is counted then.
    """

    engine: str
    setting: str
    world_size: int
    weights: int = 0
    masters: int = 0
    working: int = 0
    gradients: int = 0
    optimizer: int | None = 0
    buffers: int = 0
    on_host: tuple[str, ...] = ()
    refusal: str | None = None
    on_device: int = field(init=False)

    def __post_init__(self) -> None:
        parts = ("weights", "masters", "working", "gradients", "optimizer", "buffers")
        on_device = sum(getattr(self, part) or 0 for part in parts if part not in self.on_host)
        object.__setattr__(self, "on_device", on_device)

    @property
    def label(self) -> str:
        """The engine and what decides besides."""
        return f"{self.engine} {self.setting}".rstrip()


def footprints(
    parts: Parts, slots: OptimizerSlots | None, config: schema.Engine, world_size: int, refusals: Mapping[int, str]
) -> Iterator[Footprint]:
    """Every engine's, from the one that repeats all to the one that cuts up all.

    Args:
        parts: The model.
        slots: What the optimizer keeps; None where it is not known.
        config: The run file's section.
        world_size: How many ranks; the engine single has one.
        refusals: Why DeepSpeed would refuse, by stage, where it would.
    """
    yield replicated(parts, slots, "single", 1)
    yield replicated(parts, slots, "ddp", world_size)
    shard_size = config.fsdp.shard_size
    if shard_size and shard_size < world_size and world_size % shard_size == 0:
        yield sharded(parts, slots, config.fsdp, world_size, shard_size)
    yield sharded(parts, slots, config.fsdp, world_size, world_size)
    for stage in (0, 1, 2, 3):
        yield zero(parts, slots, config.deepspeed, world_size, stage, refusals.get(stage))


def replicated(parts: Parts, slots: OptimizerSlots | None, engine: str, world_size: int) -> Footprint:
    """Everything whole on every rank; in bf16, copies to compute with for the time of a microbatch."""
    trained = [p for p in parts.parameters if p.group is not None]
    return Footprint(
        engine,
        "",
        world_size,
        weights=_nbytes(parts.parameters),
        working=sum(p.numel * p.compute_itemsize for p in parts.parameters if p.compute_itemsize != p.itemsize),
        gradients=_nbytes(trained),
        optimizer=_state(slots, [(p.group, p.shape) for p in trained]),
        buffers=parts.buffer_bytes,
    )


def sharded(
    parts: Parts, slots: OptimizerSlots | None, config: schema.Fsdp, world_size: int, shard_size: int
) -> Footprint:
    """fsdp: rows of every parameter; blocks are gathered one by one, and the root for the whole microbatch."""
    shards = [(p, _shard(p, shard_size)) for p in parts.parameters]
    trained = [(p, shape) for p, shape in shards if p.group is not None]
    return Footprint(
        "fsdp",
        "" if shard_size == world_size else f"shard_size={shard_size}",
        world_size,
        weights=sum(math.prod(shape) * p.itemsize for p, shape in shards),
        working=_gathered(parts, config.reshard_after_forward),
        gradients=sum(math.prod(shape) * p.itemsize for p, shape in trained),
        optimizer=_state(slots, [(p.group, shape) for p, shape in trained]),
        buffers=parts.buffer_bytes,
        on_host=("weights", "gradients", "optimizer") if config.cpu_offload else (),
    )


def zero(
    parts: Parts,
    slots: OptimizerSlots | None,
    config: schema.DeepSpeed,
    world_size: int,
    stage: int,
    refusal: str | None = None,
) -> Footprint:
    """deepspeed: slices of the optimizer's state from stage 1 on, of gradients from 2 on, of weights from 3 on.

    From stage 1 on an fp32 slice is updated besides the weights, in an fp32 run too (Rajbhandari et al.,
    arXiv:1910.02054, section 5; in fp32 so in DeepSpeed's code). In bf16, the fp32 originals of frozen parameters stay
    beside their bf16 copies.
    """
    setting = f"stage={stage}"
    if refusal:
        return Footprint("deepspeed", setting, world_size, refusal=refusal)
    if stage == 0:
        return replace(replicated(parts, slots, "deepspeed", world_size), setting=setting)
    slices = _slices(parts, world_size, stage)
    sliced = _FP32_BYTES * sum(slices.values())
    share = world_size if stage == 3 else 1
    shares = [(p, -(-p.numel // share)) for p in parts.parameters]
    originals = sum(n * p.itemsize for p, n in shares if p.group is None and p.compute_itemsize != p.itemsize)
    return Footprint(
        "deepspeed",
        setting,
        world_size,
        weights=sum(n * p.compute_itemsize for p, n in shares),
        masters=sliced + originals,
        working=_live(parts, config) if stage == 3 else 0,
        gradients=_whole_gradients(parts, sliced * world_size) if stage == 1 else sliced,
        optimizer=_state(slots, [(group, (numel,)) for group, numel in slices.items()]),
        buffers=parts.buffer_bytes,
        on_host=_offloaded(config, stage),
    )


def _whole_gradients(parts: Parts, flat: int) -> int:
    """The gradients of stage 1: the parameters' own; in bf16 a flat fp32 buffer besides, in which they add up."""
    trained = [p for p in parts.parameters if p.group is not None]
    is_lower = any(p.compute_itemsize != p.itemsize for p in trained)
    return sum(p.numel * p.compute_itemsize for p in trained) + (flat if is_lower else 0)


def _nbytes(parameters: Sequence[Parameter]) -> int:
    return sum(p.numel * p.itemsize for p in parameters)


def _state(slots: OptimizerSlots | None, tensors: Sequence[tuple[int | None, tuple[int, ...]]]) -> int | None:
    """Bytes of the optimizer's state for tensors, each given by its group and shape."""
    if slots is None:
        return None
    return sum(slots.nbytes(group, shape) for group, shape in tensors if group is not None)


def _shard(parameter: Parameter, shard_size: int) -> tuple[int, ...]:
    """The shape of a rank's shard: FSDP2 cuts the first dimension, and pads so that all are as large as the first."""
    if parameter.stays_whole:
        return parameter.shape
    return (-(-parameter.shape[0] // shard_size), *parameter.shape[1:])


def _gathered(parts: Parts, reshards: bool) -> int:
    """The most that fsdp has gathered at once.

    The root's own parameters from the beginning of forward to the end of backward, and with them a block and the next
    one, which is fetched ahead; all blocks where none is given back after forward.
    """
    blocks = [0] * len(parts.blocks)
    root = 0
    for p in parts.parameters:
        if p.stays_whole:
            continue
        if p.block is None:
            root += p.numel * p.compute_itemsize
        else:
            blocks[p.block] += p.numel * p.compute_itemsize
    if not reshards:
        return root + sum(blocks)
    return root + max((sum(blocks[i : i + 2]) for i in range(len(blocks))), default=0)


def _slices(parts: Parts, world_size: int, stage: int) -> dict[int, int]:
    """Elements of a rank's flat slice of each group; stage 3 cuts each parameter, the others the whole group."""
    sizes: dict[int, int] = {}
    for p in parts.parameters:
        if p.group is not None:
            sizes[p.group] = sizes.get(p.group, 0) + (-(-p.numel // world_size) if stage == 3 else p.numel)
    if stage == 3:
        return sizes
    unit = _SLICE_ALIGNMENT * world_size
    return {group: -(-size // unit) * _SLICE_ALIGNMENT for group, size in sizes.items()}


def _live(parts: Parts, config: schema.DeepSpeed) -> int:
    """What stage 3 may have gathered at once: it gives nothing back before a limit, most often all of the model."""
    wanted = config.extra.get("zero_optimization", {}).get("stage3_max_live_parameters")
    limit = int(wanted) if isinstance(wanted, (int, float)) else _MOST_LIVE_PARAMETERS
    itemsize = max((p.compute_itemsize for p in parts.parameters), default=0)
    return min(parts.num_parameters, limit) * itemsize


def _offloaded(config: schema.DeepSpeed, stage: int) -> tuple[str, ...]:
    optimizer = ("masters", "gradients", "optimizer") if config.offload_optimizer != "none" else ()
    weights = ("weights",) if stage == 3 and config.offload_params != "none" else ()
    return (*weights, *optimizer)
