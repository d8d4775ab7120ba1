"""What is added to a class of transformers' for our tasks: what forward takes and returns, and values without a file.

A class is made of one of these and transformers' own, so names and parameters stay as they are.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import ModelError
from bigtrain.models.blocks import is_norm
from bigtrain.models.gpt import positions_in_documents
from bigtrain.models.head import Head

_OUTPUT = "lm_head"


class Loaded:
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


class Classifier(Loaded):
    """Takes a mapping (input_ids, attention_mask, …), each (samples, tokens)."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (samples, classes)."""
        tokens = inputs["input_ids"]
        self._check_length(tokens)
        if tokens.is_meta:
            inputs = {"input_ids": tokens, "attention_mask": self._any_mask(tokens)}
        logits: Tensor = super().forward(**inputs).logits  # type: ignore[misc]
        return logits


class LanguageModel(Loaded):
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


class PackingLanguageModel(LanguageModel):
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


class SummingHead(Head):
    """The output layer of transformers', which sums the cross-entropies of the targets that it is left with."""

    targets: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of hidden states, or the sum."""
        return super().forward(input, self.targets)


class SummingLanguageModel(PackingLanguageModel):
    """A decoder that sums its loss in its output layer, so that logits need not be whole."""

    lm_head: SummingHead

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sum_cross_entropy_of: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, vocabulary); or, given targets (B, T) int64, the sum of their cross-entropies.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) integers; neighbours with the same number are one document.
            sum_cross_entropy_of: The targets; -100 does not count.
        """
        self.lm_head.targets = sum_cross_entropy_of
        try:
            return super().forward(tokens, documents)
        finally:
            self.lm_head.targets = None


def of_language_model(cls: Any) -> type[LanguageModel]:
    """What is to be added to a decoder of transformers'."""
    takes_positions = "position_ids" in inspect.signature(cls.forward).parameters
    keeps_state = getattr(cls, "_is_stateful", False)  # such layers see the document before whatever the mask says
    if not takes_positions or keeps_state or not hasattr(sys.modules[cls.__module__], "create_causal_mask"):
        return LanguageModel
    return SummingLanguageModel if _returns_what_its_head_does(cls) else PackingLanguageModel


def let_head_sum(model: nn.Module) -> bool:
    """Give an output layer the way to sum; False where it is no plain linear layer. Its weight stays its own."""
    head: Any = getattr(model, _OUTPUT, None)
    is_plain = type(head) is nn.Linear and head.bias is None
    if is_plain:
        head.__class__ = SummingHead
    return is_plain


def _returns_what_its_head_does(cls: Any) -> bool:
    """Whether the logits of a class are those of its output layer, neither scaled nor capped: read from its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    made = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if "logits" in map(ast.unparse, targets):
                made.append(node.value)
    call = made[0] if len(made) == 1 else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{_OUTPUT}"


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
