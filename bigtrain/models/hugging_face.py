"""Models of a Hugging Face folder, as transformers builds them: no renamed parameter, no wrapper around them.

A folder's config.json says what the model is; nothing of a folder is ever run. What is added to transformers' own class
is a forward that takes what our tasks give and returns logits alone, and what a model built without memory needs:
initial values for what no file has, and its tables computed anew. transformers is an extra, imported only here.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import ModelError, SetupError
from bigtrain.models.blocks import is_norm
from bigtrain.models.checks import check_positive
from bigtrain.models.gpt import positions_in_documents
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
    path = Path(folder).expanduser()
    said = _read(path)
    _refuse(said, path)
    described = _described(path, said, config or {})
    cls, head = _class(described, said, head, num_classes, path)
    if num_classes is not None:
        check_positive(num_classes=num_classes)
        described.num_labels = num_classes
    if head == CLASSIFICATION and getattr(described, "pad_token_id", None) is None:
        described.pad_token_id = _first(getattr(described, "eos_token_id", None))  # as the data's tokenizer does
    made: Any = type(cls.__name__, (_mixin(cls, head), cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    try:
        with _drawing_nothing() if pretrained else nullcontext():
            model: nn.Module = made._from_config(described, dtype=torch.float32)
            model.tie_weights()  # type: ignore[operator]
    except Exception as error:
        raise ModelError(
            f"hf/{folder}: transformers cannot build {cls.__name__}: {type(error).__name__}: {error}",
            where="model.name",
            remedy="put right what its config.json or model.args.config says",
        ) from error
    return model


class _Loaded:
    """What is added to a class of transformers'."""

    config: Any

    @property
    def context(self) -> int | None:
        """The longest sequence."""
        return getattr(self.config, "max_position_embeddings", None)

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fill a piece of the parameter or buffer `name`, as transformers does for most models.

        Norms are 1, biases 0, all else is normal with config.json's `initializer_range`. It is what a new head gets;
        the rest is overwritten by the pretrained weights.
        """
        owner, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]  # type: ignore[attr-defined]
        deviation = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad():
            if leaf == "bias" or (leaf in owner._buffers and leaf != "running_var"):
                tensor.zero_()
            elif is_norm(owner) or leaf == "running_var":
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, deviation)

    def reset_buffers(self) -> None:
        """Compute the buffers anew that no file has (positions, rotary frequencies), by transformers' own rules.

        Raises:
            ModelError: Where this version of transformers has no rule for one.
        """
        tensors: tuple[Any, ...] = (*self.parameters(), *self.buffers())  # type: ignore[attr-defined]
        for tensor in tensors:
            tensor._is_hf_initialized = True  # transformers then leaves it alone
        for owner, name, module in _with_buffers(self):
            own = {leaf: module._buffers[leaf] for leaf in module._non_persistent_buffers_set}
            tables: dict[str, Any] = {
                leaf: table for leaf, table in own.items() if table is not None and not table.is_meta
            }
            for table in tables.values():
                table._is_hf_initialized = False
                table.copy_(_unlikely(table))
            with torch.no_grad():
                owner._init_weights(module)
            for leaf, table in tables.items():
                if table.numel() and bool((table == _unlikely(table)).all()):
                    raise ModelError(
                        f"transformers does not say how {name}.{leaf} is computed",
                        where="model.name",
                        remedy="set model.args.pretrained=false and name the folder in finetune.init_from:\n"
                        "the model is then built whole, on every rank, before it is cut up",
                    )

    def _any_mask(self, tokens: Tensor) -> Tensor:
        """A mask of four dimensions, which transformers takes as it is: into one on the meta device it cannot look."""
        size = tokens.shape[1]
        like: Tensor = next(self.parameters())  # type: ignore[attr-defined]
        return like.new_empty(len(tokens), 1, size, size)

    def _check_length(self, tokens: Tensor) -> None:
        if self.context is not None and tokens.shape[1] > self.context:
            raise ModelError(
                f"sequences of {tokens.shape[1]} tokens reach a model with a context of {self.context}",
                where="model.args.config",
                remedy="give the data a smaller context or max_tokens; or, where positions are rotary,\n"
                "set model.args.config: {max_position_embeddings: …}",
            )


class _Classifier(_Loaded):
    """Takes a mapping (input_ids, attention_mask, …), each (samples, tokens)."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (samples, classes)."""
        tokens = inputs["input_ids"]
        self._check_length(tokens)
        if tokens.is_meta:
            inputs = {"input_ids": tokens, "attention_mask": self._any_mask(tokens)}
        logits: Tensor = super().forward(**inputs).logits  # type: ignore[misc]
        return logits


class _LanguageModel(_Loaded):
    """A decoder that knows one document in a sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) for the token after each of tokens (B, T)."""
        return self._logits(tokens)

    def _logits(self, tokens: Tensor, **further: Tensor) -> Tensor:
        self._check_length(tokens)
        if tokens.is_meta:
            further = {"attention_mask": self._any_mask(tokens)}
        forward = super().forward  # type: ignore[misc]
        logits: Tensor = forward(input_ids=tokens, use_cache=False, **further).logits
        return logits


class _PackingLanguageModel(_LanguageModel):
    """A decoder that keeps documents apart: by their positions, from which transformers makes the mask."""

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary).

        Args:
            tokens: (B, T) int64.
            documents: (B, T) integers; neighbours with the same number are one document.
        """
        if documents is None:
            return self._logits(tokens)
        return self._logits(tokens, position_ids=positions_in_documents(documents))


def _mixin(cls: Any, head: str) -> type[_Loaded]:
    if head == CLASSIFICATION:
        return _Classifier
    takes_positions = "position_ids" in inspect.signature(cls.forward).parameters
    keeps_state = getattr(cls, "_is_stateful", False)  # such layers see the document before whatever the mask says
    packs = takes_positions and not keeps_state and hasattr(sys.modules[cls.__module__], "create_causal_mask")
    return _PackingLanguageModel if packs else _LanguageModel


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


def _with_buffers(model: Any) -> Iterator[tuple[Any, str, nn.Module]]:
    """Every module that has buffers in no file, its name, and the model of transformers' that it belongs to."""
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        above = name
        while above and above not in owners:
            above = above.rpartition(".")[0]
        owners[name] = module if isinstance(module, PreTrainedModel) else owners[above]
        if module._non_persistent_buffers_set:
            yield owners[name], name, module


def _unlikely(table: Tensor) -> Any:
    """What no table is full of."""
    if table.dtype == torch.bool:
        return torch.zeros_like(table)
    return torch.finfo(table.dtype).max if table.is_floating_point() else torch.iinfo(table.dtype).max
