"""Models of a Hugging Face folder, as transformers builds them: no renamed parameter, no wrapper around them.

A folder's config.json says what the model is; nothing of a folder is ever run. What is added to transformers' own class
is a forward that takes what our tasks give and returns logits alone, and what a model built without memory needs:
initial values for what no file has, and its tables computed anew. transformers is an extra, imported only here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.errors import ModelError, SetupError
from bigtrain.models.checks import check_positive
from bigtrain.models.hugging_face_classes import (
    Classifier,
    Loaded,
    PackingLanguageModel,
    SummingLanguageModel,
    let_head_sum,
    of_language_model,
)
from bigtrain.named import nearest, suggest

CLASSIFICATION, CAUSAL_LM = "classification", "causal_lm"
_CONFIG = "config.json"
_LONGEST_REASON = 300  # characters
_SUFFIXES = {"ForSequenceClassification": CLASSIFICATION, "ForCausalLM": CAUSAL_LM, "LMHeadModel": CAUSAL_LM}


def build(
    folder: str,
    *,
    head: str | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the model that a folder's config.json describes.

    Args:
        folder: The folder, as `save_pretrained` or `bigtrain ckpt export --to hf` writes it.
        head: classification or causal_lm; null: what the folder's own model has, or classification where
            `num_classes` is given.
        num_classes: Outputs of a classification; null: as many as the folder's own has.
        pretrained: Whether the weights come from the folder (or from `finetune.init_from`), read when the run
            starts: then nothing is drawn here. False: transformers' own initial values.
        config: Keys of config.json to change.

    Raises:
        ModelError: Where there is no such folder, or it describes nothing that can be trained so.
        SetupError: Where transformers is not installed.
    """
    path, said = look_at(folder)
    described = _described(path, said, config or {})
    cls, head = _class(described, said, head, num_classes, path)
    if num_classes is not None:
        check_positive(num_classes=num_classes)
        described.num_labels = num_classes
    if head == CLASSIFICATION and getattr(described, "pad_token_id", None) is None:
        described.pad_token_id = _first(getattr(described, "eos_token_id", None))  # as the data's tokenizer does
    added: type[Loaded] = Classifier if head == CLASSIFICATION else of_language_model(cls)
    try:
        with _drawing_nothing() if pretrained else nullcontext():
            model = _made(cls, added, described)
            if added is SummingLanguageModel and not let_head_sum(model):
                model = _made(cls, PackingLanguageModel, described)
    except Exception as error:
        raise ModelError(
            f"hf/{folder}: transformers cannot build {cls.__name__}: {type(error).__name__}: {error}",
            where="model.name",
            remedy="put right what its config.json or model.args.config says",
        ) from error
    return model


def look_at(folder: str) -> tuple[Path, Mapping[str, Any]]:
    """The folder, and what its config.json says, if there is one that can be trained.

    Raises:
        ModelError: Where there is none.
    """
    path = Path(folder).expanduser()
    said = _read(path)
    _refuse(said, path)
    return path, said


def _made(cls: Any, added: type[Loaded], described: Any) -> nn.Module:
    made: Any = type(cls.__name__, (added, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    model: nn.Module = made._from_config(described, dtype=torch.float32)
    model.tie_weights()  # type: ignore[operator]
    return model


# ---- what a folder says ----------


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise SetupError(
            "transformers is not installed",
            where="model.name",
            remedy='install the extra: pip install "bigtrain[transformers]"',
        ) from None
    return transformers


def _read(path: Path) -> Mapping[str, Any]:
    file = path / _CONFIG
    if not file.is_file():
        beside = [each.parent.name for each in path.parent.glob(f"*/{_CONFIG}")] if path.parent.is_dir() else []
        near = nearest(path.name, beside, limit=1)
        what = f"the folder {str(path)!r} holds no {_CONFIG}" if path.is_dir() else f"there is no folder {str(path)!r}"
        raise ModelError(
            what,
            where="model.name",
            remedy=(f"did you mean hf/{path.parent / near[0]}? " if near and not path.is_dir() else "")
            + "give hf/<folder>, one that save_pretrained of transformers wrote; a model on the hub is\n"
            "brought into a folder first: hf download <name> --local-dir <folder>",
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no JSON: {error}", where=str(file), remedy="copy the folder anew") from error
    if not isinstance(said, dict):
        raise ModelError(f"{file} holds no object", where=str(file), remedy="copy the folder anew")
    return said


def _refuse(said: Mapping[str, Any], path: Path) -> None:
    """Refuse what would be trained as something else than it is."""
    if said.get("quantization_config"):
        raise ModelError(
            f"the weights of {str(path)!r} are quantised, which is not read",
            where=str(path / _CONFIG),
            remedy="take the folder of the model in bf16 or fp32",
        )
    if said.get("is_encoder_decoder"):
        raise ModelError(
            f"{str(path)!r} is an encoder and a decoder, which no task here trains",
            where="model.name",
            remedy="take an encoder for classification, or a decoder for causal_lm",
        )
    if said.get("auto_map"):
        raise ModelError(
            f"{str(path)!r} needs code of its own, which is never run",
            where=str(path / _CONFIG),
            remedy="read it, put it beside your run file, and name its factory: model.name: module:factory",
        )


def _described(path: Path, said: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """What transformers makes of a config.json."""
    library = _transformers()
    try:
        plain = library.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has many names for a description that it does not know
        raise ModelError(
            f"transformers knows no model like {str(path)!r} (model_type {said.get('model_type')!r}): "
            + " ".join(str(error).split())[:_LONGEST_REASON],
            where=str(path / _CONFIG),
            remedy="put right what it says; or install a newer transformers, which may know it",
        ) from error
    for key in changes:
        if not hasattr(plain, key) or key in ("quantization_config", "auto_map"):
            raise ModelError(
                f"config.json of {str(path)!r} has no {key!r} to change",
                where="model.args.config",
                remedy=suggest(key, plain.to_dict(), "keys"),
            )
    try:
        return library.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **changes)
    except Exception as error:
        raise ModelError(
            f"transformers refuses {dict(changes)}: {' '.join(str(error).split())[:_LONGEST_REASON]}",
            where="model.args.config",
            remedy="give values as config.json has them",
        ) from error


def _class(
    described: Any, said: Mapping[str, Any], head: str | None, num_classes: int | None, path: Path
) -> tuple[Any, str]:
    """The class of transformers', and which head it has."""
    from transformers.models.auto import modeling_auto

    own = [str(name) for name in said.get("architectures") or ()]
    owns = {kind for name in own for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)}
    wanted = head or (CLASSIFICATION if num_classes is not None else min(owns, default=None))
    if wanted not in (CLASSIFICATION, CAUSAL_LM):
        raise ModelError(
            f"head is {wanted!r}"
            if head
            else f"{str(path)!r} is of {', '.join(own) or 'no class'}: its head is to be said",
            where="model.args.head",
            remedy="give classification (with num_classes) or causal_lm",
        )
    if wanted == CLASSIFICATION and num_classes is None and wanted not in owns:
        raise ModelError(
            f"{str(path)!r} is of {', '.join(own) or 'no class'}: a new head does not know how many classes there are",
            where="model.args.num_classes",
            remedy="give num_classes",
        )
    if wanted == CAUSAL_LM and num_classes is not None:
        raise ModelError("a causal_lm has no classes", where="model.args.num_classes", remedy="leave it out")
    name = f"MODEL_FOR_{'SEQUENCE_CLASSIFICATION' if wanted == CLASSIFICATION else 'CAUSAL_LM'}_MAPPING"
    cls = getattr(modeling_auto, name).get(type(described), None)
    is_encoder = cls is not None and wanted == CAUSAL_LM and _sees_what_follows(cls, described)
    if cls is None or is_encoder:
        raise ModelError(
            f"{str(path)!r} is a {described.model_type}, "
            + ("whose tokens see those that follow" if is_encoder else f"of which transformers has no {wanted}"),
            where="model.name",
            remedy="take another folder, or another head (model.args.head)",
        )
    return cls, wanted


def _sees_what_follows(cls: Any, described: Any) -> bool:
    can = hasattr(sys.modules[cls.__module__], "create_bidirectional_mask")
    return can and not getattr(described, "is_decoder", True)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


# ---- without memory ----------


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield
