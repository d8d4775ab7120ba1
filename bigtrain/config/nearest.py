"""Which key or word was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from bigtrain.config.keys import Key, all_keys
from bigtrain.errors import ConfigError, Problem

# What keys are called in Lightning, Accelerate, DeepSpeed, transformers and peft, where neither letters nor help lead
# from their name to ours.
_CALLED_ELSEWHERE = {
    "train.epochs": ("max_epochs", "num_epochs", "num_train_epochs"),
    "train.steps": ("max_steps", "num_train_steps", "max_train_steps", "total_steps"),
    "train.micro_batch_size": (
        *("gradient_accumulation_steps", "accumulate_grad_batches", "gradient_accumulation", "grad_accum"),
        *("per_device_train_batch_size", "train_micro_batch_size_per_gpu", "per_device_batch_size"),
    ),
    "data.batch_size": ("train_batch_size", "global_batch_size", "effective_batch_size"),
    "data.workers": ("num_workers", "dataloader_num_workers"),
    "optim.clip_grad_norm": ("gradient_clip_val", "gradient_clipping", "grad_clip"),
    "optim.schedule.name": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "optim.schedule.warmup_steps": ("warmup_ratio", "num_warmup_steps", "warmup_epochs"),
    "run.dir": ("output_dir", "default_root_dir", "logging_dir"),
    "run.name": ("run_name", "experiment_name"),
    "engine.device": ("accelerator", "use_cpu", "no_cuda"),
    "engine.name": ("strategy", "distributed_type", "backend"),
    "precision": ("fp16", "mixed_precision", "amp", "dtype", "torch_dtype"),
    "launch.nproc": ("num_processes", "nproc_per_node", "num_gpus"),
    "launch.nodes": ("num_nodes", "num_machines", "nnodes"),
    "track.log_every": ("logging_steps", "log_every_n_steps", "log_interval"),
    "eval.every_steps": ("eval_steps", "val_check_interval", "eval_interval"),
    "eval.every_epochs": ("check_val_every_n_epoch",),
    "eval.max_batches": ("limit_val_batches",),
    "checkpoint.keep": ("save_total_limit", "save_top_k"),
    "checkpoint.keep_best": ("load_best_model_at_end", "metric_for_best_model"),
    "checkpoint.resume": ("resume_from_checkpoint", "ckpt_path"),
    "activation_checkpointing": ("gradient_checkpointing",),
    "finetune.adapter.rank": ("lora_r", "lora_rank"),
    "finetune.adapter.alpha": ("lora_alpha",),
    "finetune.adapter.targets": ("target_modules", "lora_target"),
}
OURS = {theirs: ours for ours, words in _CALLED_ELSEWHERE.items() for theirs in words}


def distance(a: str, b: str, limit: int) -> int | None:
    """How many letters to take out, put in, change or swap with a neighbour to turn a into b, up to a limit.

    The optimal string alignment distance: Boytsov, Indexing methods for approximate dictionary searching,
    2011, https://doi.org/10.1145/1963190.1963191. None where it is above the limit.
    """
    if abs(len(a) - len(b)) > limit or len(set(a) ^ set(b)) > 2 * limit:  # an edit brings at most two letters
        return None
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        if min(row) > limit and min(above) > limit:
            return None
        before, above = above, row
    return above[-1] if above[-1] <= limit else None


def nearest_words(wrong: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The words that are a few letters away, nearest first; never `wrong` itself."""
    ranked = sorted((rank, i, word) for i, word in enumerate(words) if (rank := _rank(wrong, word)) is not None)
    return [word for _, _, word in ranked[:count]]


def keys_below(path: str) -> list[Key]:
    """A key of the run file and all keys below it; the empty path is that of the run file itself.

    Raises:
        ConfigError: Where there is no such key.
    """
    below = [key for key in all_keys() if not path or f"{key.path}.".startswith((f"{path}.", f"{path}[]."))]
    if not below:
        near = nearest_words(path, [key.path for key in all_keys()])
        remedy = "`bigtrain config keys` lists them all"
        raise ConfigError([Problem(f"there is no key {path}", key=path, suggestions=tuple(near), remedy=remedy)])
    return below


def nearest_keys(
    wrong: str, here: Sequence[Key], everywhere: Sequence[Key], given: Collection[str], count: int = 3
) -> list[Key]:
    """The keys that were probably meant by `wrong`, best first.

    Args:
        wrong: The last part of what was given.
        here: The keys of the section in which it was given.
        everywhere: All keys: the right key may have been given in the wrong section.
        given: The names that the section already has, which are less probable.
        count: How many at most.
    """
    if wrong in OURS:
        return [key for key in everywhere if key.path == OURS[wrong]]
    ranked = _ranked(wrong, here, given)
    if not ranked and wrong not in {key.name for key in everywhere}:
        # `epoch` for at_epoch, `r` for rank: said of this section rather than of a far one.
        ranked = [(3.0, key) for key in here if key.name.startswith(wrong) or wrong in key.name.split("_")]
    ranked += [(0.5, key) for key in everywhere if key.name == wrong]
    if not ranked:
        ranked = _ranked(wrong, everywhere, ())
    if not ranked:
        return _by_meaning(wrong, everywhere, count)
    ranked.sort(key=lambda entry: entry[0])
    best, _ = ranked[0]
    return [key for rank, key in ranked if rank <= best + 1][:count]


def _ranked(wrong: str, keys: Iterable[Key], given: Collection[str]) -> list[tuple[float, Key]]:
    ranks = ((_rank(wrong, key.name), key) for key in keys)
    return [(rank + 0.25 * (key.name in given), key) for rank, key in ranks if rank is not None]


def _rank(wrong: str, right: str) -> float | None:
    """The distance of two words, or None where they have too little in common, or are the same."""
    if wrong == right:
        return None
    if wrong.casefold() == right.casefold():
        return 0.1
    letters = distance(wrong, right, max(1, min(len(wrong), len(right)) // 3))
    if letters is not None:
        return letters
    shorter, longer = sorted((wrong, right), key=len)
    return 3.0 if len(shorter) >= 3 and longer.startswith(shorter) else None


def _by_meaning(wrong: str, keys: Iterable[Key], count: int) -> list[Key]:
    """The keys in whose path or help all the parts of `wrong` occur: learning_rate finds optim.lr."""
    parts = [part for part in wrong.casefold().replace("-", "_").split("_") if len(part) > 2]
    hits = [key for key in keys if parts and all(part in f"{key.path} {key.help}".casefold() for part in parts)]
    hits.sort(key=lambda key: (key.is_section, -sum(part in key.path for part in parts)))
    return hits[:count]
