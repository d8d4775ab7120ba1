"""Run files to start from, with the help of every key above it: `bigtrain init`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from bigtrain.config.help import help_of
from bigtrain.config.keys import sections_at
from bigtrain.config.nearest import nearest_words
from bigtrain.errors import UserError

_WIDTH = 100


@dataclass(frozen=True)
class Start:
    """A run file to start from.

    Attributes:
        about: What it is for, in a line.
        values: Its keys, in their order.
        needs: What it needs before it runs, in a line; empty where it runs as it is.
    """

    about: str
    values: Mapping[str, Any]
    needs: str = ""


_OPERATION: dict[str, Any] = {
    "engine": {"name": "auto"},
    "precision": "fp32",
    "eval": {"every_epochs": 1},
    "track": {"log_every": 10, "wandb": "auto"},
}

KINDS: dict[str, Start] = {
    "digits": Start(
        "handwritten digits, which are on every machine: to see how it works",
        {
            "task": "classification",
            "model": {
                "name": "torchvision/resnet18",
                "args": {"num_classes": 10, "in_channels": 1, "norm_layer": "group_norm"},
            },
            "data": {"name": "digits", "args": {"size": 28}, "eval": {"split": 0.2}, "batch_size": 64},
            "train": {"epochs": 3},
            "optim": {"name": "adamw", "lr": 0.001, "schedule": {"name": "cosine", "warmup_steps": 20}},
            **_OPERATION,
        },
    ),
    "image-classification": Start(
        "images in one folder for each class",
        {
            "task": "classification",
            "model": {"name": "torchvision/resnet18", "args": {"num_classes": 10, "norm_layer": "group_norm"}},
            "data": {
                "name": "image_folder",
                "args": {"root": "images"},
                "eval": {"split": 0.1},
                "batch_size": 64,
                "workers": 2,
                "transforms": {
                    "train": [{"name": "RandomResizedCrop", "args": {"size": 224}}, "RandomHorizontalFlip"],
                    "eval": [{"name": "Resize", "args": {"size": 256}}, {"name": "CenterCrop", "args": {"size": 224}}],
                },
            },
            "train": {"epochs": 30, "micro_batch_size": 32},
            "optim": {"name": "adamw", "lr": 0.001, "schedule": {"name": "cosine", "warmup_steps": 50}},
            **_OPERATION,
        },
        needs="data.args.root, a folder with a folder of images for each class; model.args.num_classes, their number",
    ),
    "language-model": Start(
        "a decoder on text files, byte by byte or with a tokenizer",
        {
            "task": "causal_lm",
            "model": {
                "name": "gpt",
                "args": {"vocab": 257, "layers": 4, "width": 128, "heads": 4, "context": 128, "tied": True},
            },
            "data": {
                "name": "text",
                "args": {"source": "python-stdlib", "tokenizer": "bytes", "context": 128},
                "eval": {"split": 0.01},
                "batch_size": 32,
            },
            "train": {"steps": 1000, "micro_batch_size": 16},
            "optim": {
                "name": "adamw",
                "lr": 0.001,
                "weight_decay": 0.1,
                "args": {"betas": [0.9, 0.95]},
                "schedule": {"name": "wsd", "warmup_steps": 100, "decay": 0.2},
            },
            **_OPERATION,
            "eval": {"every_steps": 200, "max_batches": 20},
        },
    ),
    "text-classification": Start(
        "texts with labels, with an encoder of a Hugging Face folder",
        {
            "task": "text_classification",
            "model": {"name": "hf/encoder", "args": {"num_classes": 2}},
            "data": {
                "name": "text_classification",
                "args": {"path": "texts.csv", "text": "text", "label": "label", "max_tokens": 256},
                "eval": {"split": 0.1},
                "batch_size": 32,
            },
            "train": {"epochs": 3, "micro_batch_size": 16},
            "optim": {"name": "adamw", "lr": 3e-5, "schedule": {"name": "linear", "warmup_steps": 20}},
            "finetune": {"new": ["classifier.*"]},
            **_OPERATION,
        },
        needs="model.name, hf/ and the folder; data.args.path, a .csv or .jsonl; finetune.new, what the folder lacks",
    ),
    "instructions": Start(
        "answers to questions, with an adapter beside a language model of a Hugging Face folder",
        {
            "task": "causal_lm",
            "model": {"name": "hf/decoder", "args": {}},
            "data": {
                "name": "conversations",
                "args": {"path": "conversations.jsonl", "context": 1024, "too_long": "skip"},
                "eval": {"split": 0.05},
                "batch_size": 16,
            },
            "train": {"epochs": 2, "micro_batch_size": 1},
            "optim": {"name": "adamw", "lr": 2e-4, "schedule": {"name": "cosine", "warmup_steps": 20}},
            "finetune": {
                "adapter": {"targets": ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"], "rank": 16, "alpha": 32.0}
            },
            **_OPERATION,
        },
        needs="model.name, hf/ and the folder, with a chat template; data.args.path, messages on each line of a .jsonl",
    ),
    "regression": Start(
        "numbers from numbers, with a model of your own",
        {
            "task": "regression",
            "model": {"name": "my_code:make_model", "args": {}},
            "data": {
                "name": "synthetic",
                "args": {"kind": "regression", "samples": 1024, "shape": [16], "targets": 1},
                "eval": {"split": 0.1},
                "batch_size": 64,
            },
            "train": {"epochs": 10},
            "optim": {"name": "adamw", "lr": 0.001},
            **_OPERATION,
        },
        needs="model.name: the module and the function that makes your model, as docs/extending.md shows",
    ),
}


def starting_file(kind: str) -> str:
    """The text of a run file to start from.

    Raises:
        UserError: Where there is none of this name.
    """
    if kind not in KINDS:
        near = nearest_words(kind, KINDS)
        remedy = f"did you mean {near[0]}?" if near else f"there are: {', '.join(KINDS)}"
        raise UserError(f"there is no run file to start from for {kind!r}", where="TASK", remedy=remedy)
    start = KINDS[kind]
    lines = [f"# {start.about[0].upper()}{start.about[1:]}."]
    if start.needs:
        lines += [f"# Yours to fill in: {start.needs}."]
    lines += ["# Every key there is: bigtrain config keys", ""]
    return "\n".join([*lines, *_written(start.values, ()), ""])


def _written(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        place = (*path, key)
        for line in textwrap.wrap(_help(place), _WIDTH - len(indent) - 2):
            yield f"{indent}# {line}"
        if isinstance(value, Mapping) and value and key != "args":
            yield f"{indent}{key}:"
            yield from _written(value, place)
        else:
            yield f"{indent}{key}: {_flow(value)}"
        if not path:
            yield ""


def _help(path: tuple[str, ...]) -> str:
    return next((text for section in sections_at(path[:-1]) if (text := help_of(section, path[-1]))), "")


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
