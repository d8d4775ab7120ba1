"""Weights of a file into the pieces that an engine holds: each rank reads its own part, under every engine.

The engine loads as it would from a checkpoint, from a reader that has the file's tensors under the model's names. What
the file does not cover is left as it is: those pieces hold their initial values.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from bigtrain.catalogue import HUGGING_FACE
from bigtrain.checkpoint import Ranks
from bigtrain.config.loader import loads
from bigtrain.config.schema import Config
from bigtrain.doors import ForeignReader, open_weights
from bigtrain.doors.base import Base, Left, digests_of
from bigtrain.doors.names import OUTPUT, gpt_args, is_llama
from bigtrain.errors import BigtrainError, CheckpointError, CorruptError, ReadError, StateError
from bigtrain.finetune.adapters import is_adapter, is_of_peft, plain_name
from bigtrain.models.gpt import GPT
from bigtrain.pretrained.finding import check_folder, find_weights
from bigtrain.pretrained.matching import Key, LoadReport, match, shown
from bigtrain.state import BUFFER, WEIGHT, Box, EngineState, TensorSpec
from bigtrain.trainer import Training

T = TypeVar("T")

_IN_NO_SHAPE = ("heads", "kv_heads", "norm_eps", "rope_theta", "tied")
_IN_NO_SHAPE_OF_THEIRS = (  # of a config.json of transformers, by all the names that its models give them
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "hidden_act", "activation_function", "activation", "rope_theta", "rope_parameters"),
    *("partial_rotary_factor", "tie_word_embeddings"),
)

_CHUNK = 32 << 20  # bytes read at once: what is needed beside the pieces themselves


def start_from(training: Training) -> LoadReport | None:
    """Read the weights that the run file says to start from; None where it says none. Every rank must call it.

    Raises:
        BigtrainError: On all ranks, where they cannot be found or read, or do not fit the model; the training is of
            no use then.
    """
    config = training.config
    source = config.begins_with
    if source is None:
        return None
    ranks = Ranks(training.world)
    _told(ranks, lambda: check_folder(config))
    _told(ranks, lambda: find_weights(config, may_download=training.world.local_rank == 0))
    as_gpt = not config.model.name.startswith(HUGGING_FACE)
    open_ = partial(open_weights, find_weights(config, may_download=False), as_gpt=as_gpt)
    reader: ForeignReader = _told(ranks, open_)
    try:
        _refuse_other_arithmetic(reader, training)
        state = training.engine.state()
        specs = _specs(training, state)
        sources, report = _match(training, specs, reader, source)
        renamed = _Renamed(reader, sources, specs, state.hyper)
        training.engine.load(renamed)
        ranks.raise_first(renamed.failure)
        if config.leaves_frozen:
            training.base = _base(training, reader, sources, specs)
    finally:
        reader.close()
    return report


def _match(
    training: Training, specs: Mapping[Key, TensorSpec], reader: ForeignReader, source: str
) -> tuple[dict[Key, Key], LoadReport]:
    """Match by the names that layers have without an adapter, which files are written with.

    Raises:
        PatternError: Where a pattern of the run file matches nothing.
        StateError: Where the model needs what the file has not, or the file has an adapter and the model has none; or
            where what begins with initial values would stay frozen to the end.
    """
    config = training.config
    theirs = {(kind, plain_name(name)): (kind, name) for kind, name in reader.index}
    has_adapter = any(is_adapter(name) for _, name in theirs)
    if has_adapter and config.finetune.adapter is None and not config.finetune.ignore:
        raise StateError(
            f"{source} holds an adapter, and this run has none",
            where="finetune.init_from",
            remedy="merge it first (bigtrain ckpt export --to safetensors; merge_and_unload of peft); or give the run\n"
            'the same finetune.adapter; or leave the adapter out: finetune.ignore: ["*.lora_*"]',
        )
    if is_of_peft([name for _, name in theirs]) and not config.finetune.remap:
        raise StateError(
            f"{source} holds an adapter of peft, and not the model that it belongs to",
            where="finetune.init_from",
            remedy="begin with that model; or merge the two first, in Python (merge_and_unload of peft)",
        )
    ours = {(kind, plain_name(name)): (kind, name) for kind, name in specs if has_adapter or not is_adapter(name)}
    sources, report = match(
        {plain: specs[key] for plain, key in ours.items()},
        {plain: reader.index[key] for plain, key in theirs.items()},
        config.finetune,
        source,
        # transformers' rules: for a model below a head, and for what older files have
        prefix=getattr(training.model, "base_model_prefix", ""),
        may_have=list(getattr(training.model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )
    _refuse_another_scale(reader, sources, config)
    plan = training.freezing
    frozen = {plain_name(name) for name in plan.frozen_in(plan.num_phases - 1)}
    random = [name for name in report.new if name in frozen]
    if random:
        has_one = config.finetune.adapter is not None
        key, how = ("adapter.train", "beside the adapter") if has_one else ("freeze", "by freezing less, or in a phase")
        raise StateError(
            f"these begin with initial values and would never train: {shown(random)}",
            where=f"finetune.{key}",
            remedy=f"let them train {how}: finetune.{key}" + ("" if has_one else ", finetune.unfreeze"),
        )
    return {ours[plain]: theirs[key] for plain, key in sources.items()}, report


def _refuse_another_scale(reader: ForeignReader, sources: Mapping[Key, Key], config: Config) -> None:
    """Refuse an adapter that would be multiplied by something else than where it was trained.

    Raises:
        StateError: Naming both.
    """
    saved, ours = _saved(reader), config.finetune.adapter
    theirs = saved.finetune.adapter if saved else None
    takes_one = any(is_adapter(name) for _, name in sources)
    if takes_one and theirs and ours and theirs.alpha != ours.alpha:
        raise StateError(
            f"the adapter of {reader.path} was trained with alpha {theirs.alpha:g}, and this run has {ours.alpha:g}",
            where="finetune.adapter.alpha",
            remedy=f'set it to {theirs.alpha:g}; or begin another adapter (finetune.ignore: ["*.lora_*"], and\n'
            'finetune.new: ["*.lora_*"])',
        )


def _base(
    training: Training, reader: ForeignReader, sources: Mapping[Key, Key], specs: Mapping[Key, TensorSpec]
) -> Base | None:
    """The frozen weights that the file has as they are, which checkpoints can leave there. Every rank must call it."""
    frozen = training.freezing.frozen_in(training.phase)
    left = {
        name: (source, specs[kind, name])
        for (kind, name), source in sources.items()
        if kind == WEIGHT and name in frozen and reader.index[source].shape == specs[kind, name].shape
    }
    digests = digests_of(training.engine.state().pieces, left, training.world)
    tensors = {name: Left(source, spec, digests[name]) for name, (source, spec) in left.items()}
    as_gpt = not training.config.model.name.startswith(HUGGING_FACE)
    return Base(reader.path.absolute(), tensors, as_gpt) if tensors else None


def _refuse_other_arithmetic(reader: ForeignReader, training: Training) -> None:
    """Refuse weights that would fit by their shapes alone, in a model that computes something else with them.

    Raises:
        StateError: Naming the arguments.
    """
    said: Mapping[str, Any] = getattr(reader, "config", {})
    config, saved = training.config, _saved(reader)
    is_gpt_there = is_llama(said) or (saved is not None and saved.model.name == "gpt")
    if config.model.name == "gpt" and is_gpt_there:
        theirs = _args_of_gpt(saved.model.args) if saved else gpt_args(said, str(reader.path))
        ours = _args_of_gpt(config.model.args)
        others = {key: (theirs[key], ours[key]) for key in _IN_NO_SHAPE if key in theirs and theirs[key] != ours[key]}
        if any(fnmatch.fnmatchcase(OUTPUT, pattern) for pattern in (*config.finetune.new, *config.finetune.ignore)):
            others.pop("tied", None)  # the output layer is declared to be another
        remedy = "set model.args to what is there"
    else:
        others = _of_another_folder(said, training)
        remedy = "say what is meant: model.args.config: {" + ", ".join(f"{key}: …" for key in others) + "}"
    if others:
        raise StateError(
            f"{reader.path} is for another {config.model.name}: "
            + ", ".join(f"{key} is {there} there and {here} here" for key, (there, here) in sorted(others.items())),
            where="model.args",
            remedy=remedy,
        )


def _saved(reader: ForeignReader) -> Config | None:
    """The run file of the run that saved a checkpoint of ours."""
    text = getattr(reader, "extra", {}).get("config")
    return loads(text) if text else None


def _args_of_gpt(given: Mapping[str, Any]) -> dict[str, Any]:
    ours = {name: given.get(name, p.default) for name, p in inspect.signature(GPT).parameters.items()}
    return {**ours, "kv_heads": ours["kv_heads"] or ours["heads"]}


def _of_another_folder(said: Mapping[str, Any], training: Training) -> dict[str, tuple[Any, Any]]:
    """What a folder's config.json says otherwise than a model hf/<another folder> does, and the run file nothing of."""
    described = getattr(training.model, "config", None)
    if training.config.finetune.init_from is None or not said.get("model_type"):
        return {}
    if said["model_type"] != getattr(described, "model_type", None):
        return {}
    try:
        theirs = type(described).from_dict(dict(said)).to_dict()  # type: ignore[union-attr]
    except Exception as error:  # anything may stand in such a file
        raise CorruptError(
            f"transformers cannot read the config.json: {type(error).__name__}: {error}",
            where=str(training.config.finetune.init_from),
            remedy="put right what it says",
        ) from error
    ours = described.to_dict()  # type: ignore[union-attr]
    declared = training.config.model.args.get("config") or {}
    keys = [key for key in _IN_NO_SHAPE_OF_THEIRS if key in theirs and key in ours and key not in declared]
    return {key: (theirs[key], ours[key]) for key in keys if theirs[key] != ours[key]}


def _told(ranks: Ranks, action: Callable[[], T]) -> T:
    """Do something that may fail on this rank alone; every rank raises what the first that failed has raised."""
    result: T | None = None
    failure: BigtrainError | None = None
    try:
        result = action()
    except BigtrainError as error:
        failure = error
    for other in ranks.gather(failure):
        if other is not None:
            raise failure or other
    return result  # type: ignore[return-value]  # no failure: it is there


def _specs(training: Training, state: EngineState) -> dict[Key, TensorSpec]:
    """Every weight and buffer of the model, whole, in the model's own order: a rank may hold no part of some."""
    mine = {piece.key: TensorSpec(piece.shape, piece.dtype) for piece in state.pieces if piece.kind in (WEIGHT, BUFFER)}
    of_ranks: dict[Key, TensorSpec] = {}
    for theirs in training.world.all_gather_object(mine):
        of_ranks |= theirs
    named = [(WEIGHT, name) for name, _ in training.model.named_parameters()]
    named += [(BUFFER, name) for name, _ in training.model.named_buffers()]
    return {key: of_ranks[key] for key in dict.fromkeys(named) if key in of_ranks}


class _Renamed:
    """The file's tensors under the model's names. It never fails while ranks load: the first failure is kept."""

    def __init__(
        self,
        reader: ForeignReader,
        sources: Mapping[Key, Key],
        specs: Mapping[Key, TensorSpec],
        hyper: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._reader, self._sources = reader, sources
        self.failure: CheckpointError | None = None
        self.hyper, self.index = hyper, specs

    def read_into(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        source = self._sources.get((kind, name))
        if source is None or self.failure is not None:
            return
        shape = self._reader.index[source].shape
        try:
            for part, view in _chunks(_common(box, shape), box, out):
                self._reader.read_into(*source, part, view)
        except CheckpointError as error:
            self.failure = error
        except (OSError, RuntimeError) as error:
            self.failure = ReadError(f"{name} cannot be read: {error}", where=str(self._reader.path))


def _common(box: Box, shape: tuple[int, ...]) -> Box:
    """The part of a box that a tensor of this shape has."""
    size = tuple(max(0, min(o + n, total) - o) for o, n, total in zip(box.offset, box.size, shape, strict=True))
    return Box(box.offset, size)


def _chunks(part: Box, box: Box, out: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """A part of a box in pieces of some rows, each with the place in `out` (the whole box) that it goes to."""
    if not math.prod(part.size):
        return
    if not part.size:
        yield part, out
        return
    place = out[tuple(slice(0, n) for n in part.size)]
    row = math.prod(part.size[1:]) * out.element_size()
    step = max(1, _CHUNK // max(1, row))
    for start in range(0, part.size[0], step):
        rows = min(step, part.size[0] - start)
        yield (
            Box((part.offset[0] + start, *part.offset[1:]), (rows, *part.size[1:])),
            place[start : start + rows],
        )
