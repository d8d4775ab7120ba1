"""A training that goes on with the head alone, on features that are computed once or lie on the disk already."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Subset

from bigtrain.checkpoint import Ranks
from bigtrain.checkpoint.files import DISK
from bigtrain.config.schema import Config
from bigtrain.data import DataSets, EvalLoader
from bigtrain.data.randomness import is_random
from bigtrain.data.split import Part
from bigtrain.errors import CheckpointError, CombinationError, SaveError
from bigtrain.features.cutting import Cut, find_head
from bigtrain.features.store import Cache, Shard, ShardWriter, commit, open_cache
from bigtrain.finetune.digest import digest
from bigtrain.protocols import Batch, Dataset
from bigtrain.state import BUFFER, WEIGHT
from bigtrain.trainer import Training, loaders

_TRIED_SAMPLES = 2
_LEFT_FOR_S = 86_400.0
# By how much features computed again may differ: other batch sizes add in another order.
_ROUNDING = {torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Cached:
    """What came of it.

    Attributes:
        path: Where the features lie.
        words: What to tell the user, line by line.
    """

    path: Path
    words: list[str]


def use_features(training: Training) -> Cached | None:
    """Compute the features of all samples, or take them from the disk, and let the head train on them alone.

    Every rank must call it, with the weights in place. Nothing is done where the run file does not ask for it, or
    where, in a later phase of the freeze plan, more than the head trains.

    Raises:
        CombinationError: On all ranks, where the features would not be the same each time, or are not all there is.
        SaveError: On all ranks, where they cannot be written.
    """
    config = training.config
    if config.finetune.feature_cache is None:
        return None
    trained = {name for group in training.plan.groups for name in group.names}
    try:
        cut = Cut(training.model, find_head(training.model, trained))
    except CombinationError:
        if training.phase == 0:
            raise
        return None
    splits = {"train": training.sets.train} | ({"eval": training.sets.eval} if training.sets.eval else {})
    _refuse_random(splits)
    tried = training.move(_first(splits["train"]))
    cut.check(training.engine, training.task, tried)
    key = _key(training, cut)
    folder = Path(config.finetune.feature_cache).expanduser() / key
    began = time.perf_counter()
    cache, why_not = _opened(training, folder, key, splits)
    if cache is not None and not _are_same(training, cut, cache, tried):
        cache, why_not = None, "its features are others than the model computes now"
    words = [f"features before {cut.name} are read from {folder}"]
    if cache is None:
        count = sum(map(len, splits.values()))
        cache = _compute(training, cut, folder, key, splits)
        again = f"{folder} cannot be used: {why_not}; its features are computed anew" if why_not else None
        took = f"features of {count:,} samples before {cut.name}: {time.perf_counter() - began:.1f} s, kept in {folder}"
        words = [*([again] if again else []), took]
    _train_on(training, cut, cache)
    return Cached(folder, words)


def _refuse_random(splits: dict[str, Dataset]) -> None:
    for name, dataset in splits.items():
        if is_random(dataset.base if isinstance(dataset, Part) else dataset):
            raise CombinationError(
                f"the samples of {name} are read with random choices, and features are computed once",
                where=f"data.transforms.{name}",
                remedy="take random transforms out, or finetune.feature_cache. A dataset of your own that draws\n"
                "nothing says is_random = False",
            )


def _first(dataset: Dataset) -> Batch:
    return next(iter(_loader(dataset, np.arange(min(_TRIED_SAMPLES, len(dataset))), _TRIED_SAMPLES, 0)))


def _loader(dataset: Dataset, positions: Any, batch_size: int, workers: int) -> EvalLoader:
    """Samples by their positions in a dataset, whose numbers in what it is a part of are looked up."""
    base: Any = dataset
    if isinstance(dataset, Part):
        base, positions = dataset.base, dataset.locate(positions)
    chosen: Any = Subset(base, positions.tolist())
    return EvalLoader(chosen, batch_size=batch_size, workers=workers, collate=getattr(base, "collate", None))


# ---- what they follow from ----------


def _key(training: Training, cut: Cut) -> str:
    """A hash of all that features follow from. Every rank must call it, and gets the same."""
    config = training.config
    mine: dict[str, int] = {}
    for piece in training.engine.state().pieces:
        if piece.kind in (WEIGHT, BUFFER) and piece.is_owner and not piece.name.startswith(cut.name + "."):
            title = f"{piece.kind} {piece.name} {piece.shape} {piece.dtype}"
            mine[title] = mine.get(title, 0) + digest(piece.data, piece.shape, piece.box)
    total: dict[str, int] = {}
    for theirs in training.world.all_gather_object(mine):
        for title, value in theirs.items():
            total[title] = (total.get(title, 0) + value) % 2**64
    words = [
        *(f"{title} {total[title]}" for title in sorted(total)),
        *(cut.name, training.fingerprint, config.precision, _dumped(config.model), _data_of(config)),
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(words).encode())


def _data_of(config: Config) -> str:
    kept = config.data.model_dump(exclude={"batch_size", "workers", "mix"})
    return json.dumps(kept, sort_keys=True, default=str)


def _dumped(section: Any) -> str:
    return json.dumps(section.model_dump(), sort_keys=True, default=str)


# ---- from the disk ----------


def _opened(training: Training, folder: Path, key: str, splits: dict[str, Dataset]) -> tuple[Cache | None, str | None]:
    """The cache, if there is one and all of it is what was written; else why not, where there is something."""
    world = training.world
    cache, problems = None, []
    try:
        cache = open_cache(folder, key, {name: len(dataset) for name, dataset in splits.items()})
        problems = cache.problems(world.rank, world.size)
    except FileNotFoundError:
        problems = ["it is not whole"] if folder.is_dir() else [""]
    except Exception as error:
        problems = [str(error) or type(error).__name__]
    found = [word for theirs in world.all_gather_object(problems) for word in theirs]
    if not found:
        return cache, None
    return None, next((word for word in found if word), None)


def _are_same(training: Training, cut: Cut, cache: Cache, tried: Batch) -> bool:
    """Whether the first features are what the model computes: its code may have changed. Every rank must call it."""
    with training.engine.evaluating(), cut.watched():
        training.task.loss(training.engine.model, tried)
        expected = cut.features()
    kept = cache.samples("train", None).__getitems__(range(len(tried)))[0].to(expected.device)
    tolerance = _ROUNDING.get(expected.dtype, 1e-4)
    is_same = kept.shape == expected.shape and kept.dtype == expected.dtype
    is_near = is_same and bool((kept - expected).double().norm() <= tolerance * expected.double().norm())
    return all(training.world.all_gather_object(is_near))


# ---- computed ----------


def _compute(training: Training, cut: Cut, folder: Path, key: str, splits: dict[str, Dataset]) -> Cache:
    """Every rank computes a share of the samples and writes it; rank 0 makes a cache of it all."""
    ranks = Ranks(training.world)
    _agreed(ranks, folder, lambda: _make_way(ranks, folder))
    aside = folder.with_name(f"{folder.name}.tmp-{ranks.broadcast(uuid.uuid4().hex[:8])}")
    failure: CheckpointError | None = None
    mine: dict[str, Shard] = {}
    for name, dataset in splits.items():
        writer = ShardWriter(aside, name, ranks.rank)
        for parts in _features(training, cut, dataset):
            # A rank whose disk fails goes on computing, as the others may wait for it in a forward pass.
            failure = failure or ranks.attempt(lambda w=writer, p=parts: w.add(p), SaveError)[1]  # type: ignore[misc]
        shard, late = ranks.attempt(writer.finish, SaveError)
        failure = failure or late
        mine[name] = shard or Shard(0, [])
    try:
        _agreed(ranks, folder, lambda: _raise(failure))
        written = ranks.gather(mine)
        about = {"head": cut.name, "model": training.config.model.name, "data": training.config.data.name}
        of_splits = {name: [theirs[name] for theirs in written] for name in splits}
        _agreed(ranks, folder, lambda: _commit(ranks, aside, folder, key, about, of_splits))
    finally:
        if ranks.is_main:
            with suppress(OSError):
                DISK.remove_tree(aside)  # what was not committed
    cache, why_not = _opened(training, folder, key, splits)
    if cache is None:
        raise SaveError(
            f"features were written to {folder}, and cannot be read back: {why_not}",
            where="finetune.feature_cache",
            remedy="name a folder that all machines share, or take the key out",
        )
    return cache


def _raise(failure: CheckpointError | None) -> None:
    if failure is not None:
        raise failure


def _agreed(ranks: Ranks, folder: Path, action: Callable[[], None]) -> None:
    """Do something with files; what fails on one rank is raised on all."""
    try:
        ranks.agree(action, SaveError)
    except CheckpointError as error:
        raise SaveError(
            f"features cannot be kept in {folder.parent}: {error.problem}",
            where="finetune.feature_cache",
            remedy="name a folder with room in which you may write, or take the key out",
        ) from error


def _make_way(ranks: Ranks, folder: Path) -> None:
    """Take away a cache that cannot be used, and what writers that were killed left behind a day ago or more."""
    if not ranks.is_main:
        return
    if DISK.exists(folder):
        gone = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        DISK.rename(folder, gone)  # at once: another run may look
        DISK.remove_tree(gone)
    for name in DISK.names(folder.parent):
        left = folder.with_name(name)
        if name.startswith(f"{folder.name}.tmp-") and time.time() - left.lstat().st_mtime > _LEFT_FOR_S:
            DISK.remove_tree(left)


def _commit(ranks: Ranks, aside: Path, folder: Path, key: str, about: Any, splits: dict[str, list[Shard]]) -> None:
    if not ranks.is_main:
        return
    commit(aside, key, about, splits)
    if not DISK.exists(folder):  # else another run was faster: what it has is the same
        DISK.rename(aside, folder)
        DISK.sync_folder(folder.parent)


def _features(training: Training, cut: Cut, dataset: Dataset) -> Iterator[list[torch.Tensor]]:
    """This rank's share of a dataset, batch by batch: features, and what else belongs to the samples."""
    config, world = training.config, training.world
    bounds = np.linspace(0, len(dataset), world.size + 1).astype(np.int64)
    mine = np.arange(bounds[world.rank], bounds[world.rank + 1])
    most = int(np.diff(bounds).max())  # every rank makes as many batches
    filled = np.concatenate((mine, np.full(most - len(mine), mine[-1] if len(mine) else 0)))
    share = -(-config.data.batch_size // world.size)
    loader = _loader(dataset, filled, min(config.train.micro_batch_size or share, share), config.data.workers)
    left = len(mine)
    try:
        with training.engine.evaluating(), cut.watched():
            for batch in loader:
                moved = training.move(batch)
                training.task.loss(training.engine.model, moved)
                parts = [cut.features(), *batch.data[1:]]
                if left:
                    yield [part[:left] for part in parts]
                left = max(0, left - len(batch))
    finally:
        loader.close()


# ---- used ----------


def _train_on(training: Training, cut: Cut, cache: Cache) -> None:
    names = training.class_names
    evaluation = cache.samples("eval", names) if training.sets.eval else None
    sets = DataSets(cache.samples("train", names), evaluation, training.fingerprint)
    training.train.close()
    if training.evaluation is not None:
        training.evaluation.close()
    training.train, training.evaluation = loaders(training.config, sets, training.world)
    training.when_closed.append(cut.apply())
