"""What a run will do, without starting it: its batches, what is sharded how, and bytes a rank under every engine.

Here are the numbers; `words` makes sentences of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bigtrain import engines
from bigtrain.config.schema import Config
from bigtrain.engines.base import Zero
from bigtrain.engines.deepspeed_config import build_config, check
from bigtrain.errors import CombinationError, DataError, SetupError, UserError
from bigtrain.explain.batches import Batches, divide
from bigtrain.explain.memory import Footprint, footprints, sharded
from bigtrain.explain.parts import OptimizerSlots, Parts, build_on_meta, take_apart
from bigtrain.models.blocks import find_blocks
from bigtrain.optim import OptimizerPlan, plan_optimizer
from bigtrain.prepare import refuse_local_batchnorm
from bigtrain.trainer import build_data

__all__ = ["Advice", "Batches", "Explanation", "Footprint", "Parts", "explain"]

_TORCHVISION = "torchvision/"
# From the fastest to the one that saves most; the engine single only where there is one process.
_BY_SPEED = ("single", "ddp", "fsdp", "deepspeed")
# How often the number of processes is doubled in search of one at which the run fits.
_DOUBLINGS = 12


@dataclass(frozen=True)
class Advice:
    """Which engine to take, by weights, gradients and optimizer state alone.

    Attributes:
        fastest: The fastest engine that fits; None where none does, or the device's memory is not known.
        smallest: The engine that needs least of the device.
        fits_from: Where none fits: how many processes would do under fsdp, doubling their number; None where no
            number does.
    """

    fastest: Footprint | None
    smallest: Footprint
    fits_from: int | None


@dataclass(frozen=True)
class Explanation:
    """What a run will do.

    Attributes:
        config: The run file.
        world_size: How many processes.
        engine: The engine that the run uses.
        why: Why that one.
        batches: How samples are divided.
        parts: The model.
        footprints: Bytes a rank, under every engine.
        chosen: Which of them is this run's.
        gpu_memory: Bytes of a device's memory; None where that is not known.
        advice: Which engine to take.
        refusals: Why a training of this run would be refused.
        notes: What could not be found out, and why.
    """

    config: Config
    world_size: int
    engine: str
    why: str
    batches: Batches
    parts: Parts
    footprints: tuple[Footprint, ...]
    chosen: Footprint
    gpu_memory: int | None
    advice: Advice
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the run file and single parameters."""
        config = self.config
        named = {"run": config.run.name, "model": config.model.name, "data": config.data.name}
        model = {
            "num_parameters": self.parts.num_parameters,
            "num_trained": self.parts.num_trained,
            "blocks": [asdict(block) for block in self.parts.blocks],
            "left_to_root": self.left_to_root(),
            "stays_whole": self.stays_whole(),
        }
        left_out = ("config", "parts")
        numbers = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {**named, "precision": config.precision, **numbers, "parts": model}

    def left_to_root(self) -> dict[str, int]:
        """Elements of the parameters that fsdp shards, but with no block."""
        return {p.name: p.numel for p in self.parts.parameters if p.block is None and not p.stays_whole}

    def stays_whole(self) -> dict[str, int]:
        """Elements of the parameters that fsdp leaves whole on every rank."""
        return {p.name: p.numel for p in self.parts.parameters if p.stays_whole}


def explain(config: Config, *, world_size: int = 1, gpu_memory: int | None = None) -> Explanation:
    """Find out what a run will do; nothing is started, written or downloaded.

    Args:
        config: The run file.
        world_size: How many processes.
        gpu_memory: Bytes of a device's memory; None asks the GPU that is here, if there is one.

    Raises:
        UserError: Where the run file names something that cannot be: a model, data, an optimizer, a pattern.
    """
    name, why = engines.choose(config.engine.name, world_size)
    model, freezing = build_on_meta(config)
    last = freezing.num_phases - 1
    plan = plan_optimizer(model, config.optim, lr_scales=freezing.lr_scales(last), begins=freezing.begins())
    parts = take_apart(model, plan, config.precision)
    slots, notes = _optimizer_slots(plan, parts, config)
    num_samples, about_data = _count_samples(config)
    found = tuple(footprints(parts, slots, config.engine, world_size, _refused_stages(config, model, plan)))
    if not all(p.is_meta for p in model.parameters()):
        notes.append(f"{config.model.name} had to be built in memory: its factory reads values while it builds")
    chosen = _chosen(found, name, config)
    memory = gpu_memory if gpu_memory is not None else _memory_of_gpu(config)
    return Explanation(
        config=config,
        world_size=world_size,
        engine=name,
        why=why,
        batches=divide(config, world_size, num_samples),
        parts=parts,
        footprints=found,
        chosen=chosen,
        gpu_memory=memory,
        advice=_advise(found, memory, lambda size: sharded(parts, slots, config.engine.fsdp, size, size).on_device),
        refusals=tuple(_refusals(config, model, chosen, world_size)),
        notes=(*notes, *about_data),
    )


def _optimizer_slots(plan: OptimizerPlan, parts: Parts, config: Config) -> tuple[OptimizerSlots | None, list[str]]:
    try:
        return OptimizerSlots(plan, parts, config.precision, averaged=config.optim.ema is not None), []
    except UserError:
        raise
    except Exception as error:  # a user's optimizer may need a GPU, or larger tensors
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return None, [f"the state of {plan.cls.__name__} is not counted: a step on tiny tensors ended in {said}"]


def _refused_stages(config: Config, model: nn.Module, plan: OptimizerPlan) -> dict[int, str]:
    """Why DeepSpeed would refuse this run, by stage, where it would. Whether it is installed does not count here."""
    section = config.engine.deepspeed
    refused = {}
    for stage in (0, 1, 2, 3):
        choices = engines.Choices(
            compute_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            zero=Zero(stage, section.offload_optimizer != "none", section.offload_params != "none", section.extra),
        )
        try:
            build_config(choices)
            check(model, plan, choices)
        except CombinationError as error:
            refused[stage] = error.problem
        except SetupError:
            continue
    return refused


def _count_samples(config: Config) -> tuple[int | None, list[str]]:
    """How many samples there are to train on, or why that is not known."""
    section = config.data
    changes: dict[str, Any] = {"args": _without_download(section.name, section.args)}
    if not hasattr(section.eval, "split"):
        changes["eval"] = "none"  # data of its own does not count here
    try:
        return len(build_data(config.model_copy(update={"data": section.model_copy(update=changes)})).train), []
    except DataError as error:
        if error.where == "data.name":
            raise
        where = f" ({error.where})" if error.where else ""
        said = error.problem.partition("\n")[0]
        return None, [f"the number of samples is not known: {said}{where}"]


def _without_download(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a dataset such that it does not fetch its files."""
    if not name.startswith(_TORCHVISION):
        return args
    from torchvision import datasets

    library = getattr(datasets, name.removeprefix(_TORCHVISION), None)
    may_download = library is not None and "download" in inspect.signature(library).parameters
    return {**args, "download": False} if may_download else args


def _memory_of_gpu(config: Config) -> int | None:
    if config.engine.device == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _refusals(config: Config, model: nn.Module, chosen: Footprint, world_size: int) -> Iterator[str]:
    """Why a training would be refused that this module can explain nevertheless."""
    try:
        refuse_local_batchnorm(model, world_size)
    except CombinationError as error:
        yield error.problem
    if config.activation_checkpointing != "none" and not find_blocks(model):
        yield "the model has no repeated blocks whose activations could be computed again"
    if chosen.refusal:
        yield f"{chosen.label}: {chosen.refusal}"
    if chosen.engine == "single" and world_size > 1:
        yield f"the engine single runs in one process, and there are {world_size}"
    shard_size = config.engine.fsdp.shard_size
    if chosen.engine == "fsdp" and shard_size and world_size % shard_size:
        yield f"engine.fsdp.shard_size is {shard_size}, which does not divide the {world_size} processes"


def _chosen(found: Sequence[Footprint], engine: str, config: Config) -> Footprint:
    """The run's own: by its stage, or by its shard size where that has a line."""
    setting = f"stage={config.engine.deepspeed.stage}"
    return next(each for each in found if each.engine == engine and (engine != "deepspeed" or each.setting == setting))


def _advise(found: Sequence[Footprint], memory: int | None, under_fsdp: Callable[[int], int]) -> Advice:
    """Choose among the engines that this run may use.

    Args:
        found: Every engine's footprint.
        memory: Bytes of a device's memory; None where that is not known.
        under_fsdp: Bytes a rank under fsdp, by the number of processes.
    """
    world_size = found[-1].world_size
    out_of_place = "ddp" if world_size == 1 else "single"
    usable = [f for f in found if f.engine in engines.NAMES and f.engine != out_of_place and f.refusal is None]
    usable.sort(key=lambda each: _BY_SPEED.index(each.engine))
    smallest = min(usable, key=lambda each: each.on_device)
    if memory is None:
        return Advice(None, smallest, None)
    fastest = next((each for each in usable if each.on_device <= memory), None)
    if fastest is not None:
        return Advice(fastest, smallest, None)
    sizes = (world_size << doubled for doubled in range(1, _DOUBLINGS + 1))
    return Advice(None, smallest, next((size for size in sizes if under_fsdp(size) <= memory), None))
