"""An explanation in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from bigtrain.explain import Explanation, Footprint
from bigtrain.explain.batches import Batches
from bigtrain.explain.parts import Block

_SHOWN = 6
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_ZERO = {
    0: "deepspeed stage 0 cuts nothing: every rank holds all weights, gradients and optimizer state",
    1: "deepspeed stage 1 cuts the optimizer's state and an fp32 copy of the trained weights into {size} slices; "
    "weights and gradients are whole on every rank",
    2: "deepspeed stage 2 cuts gradients, the optimizer's state and an fp32 copy of the trained weights into {size} "
    "slices; weights are whole on every rank",
    3: "deepspeed stage 3 cuts weights, gradients, the optimizer's state and an fp32 copy of the trained weights into "
    "{size} slices, and gathers weights where they are used",
}


def size_of(num_bytes: int) -> str:
    """Bytes as people read them."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def title(explained: Explanation) -> str:
    """One line that says which run this is."""
    config = explained.config
    return (
        f"{config.run.name}: {config.model.name} on {config.data.name}, {_processes(explained.world_size)}, "
        f"engine {explained.chosen.label}, {config.precision}"
    )


def sections(explained: Explanation) -> dict[str, list[str]]:
    """All that is to be said, by heading."""
    return {
        "batches": list(_batches(explained.batches)),
        "model": list(_model(explained)),
        "sharding": list(_sharding(explained)),
        "memory": list(_memory(explained)),
        "advice": list(_advice(explained)),
    }


def warnings(explained: Explanation) -> list[str]:
    """What would be refused, and what could not be found out."""
    return [*(f"as it stands, training refuses this run: {text}" for text in explained.refusals), *explained.notes]


def _counted(count: float, what: str) -> str:
    return f"{count:,.3g} {what}{'' if count == 1 else 's'}" if count < 1000 else f"{count:,.0f} {what}s"


def _processes(count: int) -> str:
    return f"{count:,} process{'' if count == 1 else 'es'}"


def _batches(batches: Batches) -> Iterator[str]:
    most, fewest = sum(batches.most), sum(batches.fewest)
    line = f"{batches.batch_size:,} samples a step"
    if batches.world_size == 1:
        yield f"{line}, in {_microbatches(batches.most)}"
    elif batches.most == batches.fewest:
        yield f"{line}, over {_processes(batches.world_size)}: {most:,} each, in {_microbatches(batches.most)}"
    else:
        yield (
            f"{line}, over {_processes(batches.world_size)}: from {most:,} on the first, in "
            f"{_microbatches(batches.most)}, to {fewest:,} on the last, in {_microbatches(batches.fewest)}"
        )
        if 0 in batches.fewest:
            yield "a microbatch of 0 repeats a sample with weight 0, so that every rank makes as many"
    yield _length(batches)


def _microbatches(sizes: Sequence[int]) -> str:
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    if len(runs) == 1:
        return f"{len(sizes):,} microbatch{'' if len(sizes) == 1 else 'es'} of {sizes[0]:,}"
    return f"{len(sizes):,} microbatches ({', '.join(f'{count:,} of {size:,}' for size, count in runs)})"


def _length(batches: Batches) -> str:
    steps = "" if batches.total_steps is None else f"{batches.total_steps:,} steps in all"
    if batches.num_samples is None or batches.steps_per_epoch is None:
        return f"{steps or f'{batches.epochs} epochs'}; steps an epoch are not known"
    last = "" if batches.last_step == batches.batch_size else f", the last one of {batches.last_step:,}"
    epochs = batches.epochs or (batches.total_steps or 0) / batches.steps_per_epoch
    return (
        f"{batches.num_samples:,} samples to train on: {batches.steps_per_epoch:,} steps an epoch{last}; "
        f"{steps}, {_counted(epochs, 'epoch')}"
    )


def _model(explained: Explanation) -> Iterator[str]:
    parts = explained.parts
    frozen = parts.num_parameters - parts.num_trained
    yield f"{parts.num_parameters:,} parameters, " + (f"{frozen:,} of them frozen" if frozen else "all of them trained")
    if not parts.blocks:
        yield "no repeated blocks are found" + (" that share no parameters" if parts.shared_blocks else "")
    yield from _blocks(parts.blocks)
    outside = explained.left_to_root()
    if outside and parts.blocks:
        yield f"outside of blocks {sum(outside.values()):,}: {_listed(outside)}"


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for (kind, size), alike in groupby(blocks, key=lambda block: (block.kind, block.num_parameters)):
        names = [block.name for block in alike]
        shown = ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"
        yield f"{_counted(len(names), 'block')} of {size:,}{' each' if len(names) > 1 else ''} ({kind}): {shown}"


def _listed(sizes: Mapping[str, int]) -> str:
    """The largest few of named sizes."""
    largest = sorted(sizes, key=lambda name: -sizes[name])
    rest = f", and {len(largest) - _SHOWN:,} smaller ones" if len(largest) > _SHOWN else ""
    return ", ".join(f"{name} ({sizes[name]:,})" for name in largest[:_SHOWN]) + rest


def _sharding(explained: Explanation) -> Iterator[str]:
    chosen = explained.chosen
    if explained.config.engine.name == "auto":
        yield f"auto took {chosen.engine}: {explained.why}"
    if chosen.engine == "single":
        yield "one process holds everything"
    elif chosen.engine == "ddp":
        yield "every rank holds all weights, gradients and optimizer state"
        yield "gradients are summed over ranks in the last microbatch of a step, while its backward runs"
    elif chosen.engine == "fsdp":
        yield from _fsdp(explained)
    else:
        yield _ZERO[explained.config.engine.deepspeed.stage].format(size=chosen.world_size)


def _fsdp(explained: Explanation) -> Iterator[str]:
    config, size, parts = explained.config.engine.fsdp, explained.world_size, explained.parts
    shards = config.shard_size if explained.chosen.setting and config.shard_size else size
    copies = f"; {size // shards} copies of all of it" if shards != size else ""
    ranks = _counted(shards, "rank")
    yield f"each parameter is cut by rows over {ranks}, and so are its gradient and optimizer state{copies}"
    if parts.blocks:
        kept = (
            "given back after forward and again after backward"
            if config.reshard_after_forward
            else "kept until backward"
        )
        yield f"blocks are gathered one by one, each while the one before it computes, and {kept}"
    if explained.left_to_root():
        yield "what is outside of blocks is gathered by the root, from the start of forward to the end of backward"
    if parts.shared_blocks:
        yield f"left to the root, because they share parameters with other parts: {', '.join(parts.shared_blocks)}"
    if whole := explained.stays_whole():
        yield f"whole on every rank, because they cannot be cut: {_listed(whole)}"
    yield "gradients are summed and cut in every microbatch, so that they never lie whole"
    if config.cpu_offload:
        yield "shards, their gradients and optimizer state lie on the host"


def _memory(explained: Explanation) -> Iterator[str]:
    own = explained.chosen
    yield "of the rank that holds most; working: copies to compute with, or the most that is gathered at once"
    if explained.config.optim.ema:
        yield "optimizer: averages of the weights that train (optim.ema) are in it, beside its own state"
    yield "not estimated: activations, buffers of communication, and what the allocator wastes"
    if own.buffers:
        yield f"the model's buffers, {size_of(own.buffers)} on every rank, are in the sum"
    for each in explained.footprints:
        if each.refusal:
            yield f"{each.label}: {each.refusal}"
    if any(each.on_host for each in explained.footprints):
        yield "marked by *: in the host's memory, and not in the sum"


def _advice(explained: Explanation) -> Iterator[str]:
    advice, memory, world_size = explained.advice, explained.gpu_memory, explained.world_size
    smallest = f"{advice.smallest.label} needs least: {size_of(advice.smallest.on_device)}"
    if memory is None:
        fastest = "single" if world_size == 1 else "ddp"
        yield f"{smallest}; {fastest} is the fastest where all of it fits"
        yield "whether it fits is not known: there is no GPU here; say how large one is with --gpu-memory GiB"
    elif advice.fastest is None:
        enough = f"; fsdp fits on {_processes(advice.fits_from)}" if advice.fits_from else ""
        yield f"nothing fits in {size_of(memory)} on {_processes(world_size)}: {smallest}{enough}"
        optim = explained.config.optim
        if optim.name in ("adam", "adamw") and optim.moments == "fp32":
            yield "optim.moments=bf16, with optim.args.betas=[0.9, 0.95], halves what the optimizer keeps"
    else:
        left = size_of(memory - advice.fastest.on_device)
        yield f"take {_keys(advice.fastest)}: the fastest that fits in {size_of(memory)}; {left} are left"
        if advice.smallest is not advice.fastest:
            yield f"{smallest}, for larger activations"
    yield "this goes by weights, gradients and optimizer state only: activations need room beside them"


def _keys(footprint: Footprint) -> str:
    """The keys of the run file that choose it."""
    setting = f" engine.{footprint.engine}.{footprint.setting}" if footprint.setting else ""
    return f"engine.name={footprint.engine}{setting}"
