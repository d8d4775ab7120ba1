"""Language modelling: the next token, given those before it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.errors import CombinationError, DataError, ModelError
from bigtrain.protocols import Batch, Dataset, LossSum
from bigtrain.tasks.inspection import check_tokens, sample, try_on
from bigtrain.tasks.tensors import at_least_fp32, describe, mismatch, outputs, valid_part

IGNORED = -100  # torch's default for a target that does not count


class CausalLM:
    """Batches are mappings.

    - `tokens` (B, T+1) int64: the model gets the first T, and is to predict the last T.
    - `targets` (B, T) int64, optional: what is to be predicted instead; -100 does not count.
    - `documents` (B, T+1) integers, optional: the number of each token's document. The model gets the first T
    as
      `documents`, to keep them apart, and a target in another document than the token before it does not
      count.

    The model returns logits (B, T, vocabulary). Where its `forward` takes `sum_cross_entropy_of`, it is asked for the
    sum itself once `check` ran, so that it need not hold all logits at once.
    """

    def __init__(self) -> None:
        # Of the model, known once `check` ran: an engine's wrapper hides what `forward` takes.
        self._vocab: int | None = None
        self._model_sums = False

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The sum of the cross-entropies of all targets that count, and their number.

        Raises:
            DataError: On CPU, naming the sample with a token outside the vocabulary. Elsewhere looking would
                wait for the device: once `check` ran, the loss of that microbatch becomes NaN.
        """
        tokens = batch.data["tokens"]
        if tokens.device.type == "cpu":
            try:
                return self._sums(model, tokens, batch)
            except IndexError:
                self._check_tokens(tokens, batch)
                raise
        if self._vocab is None:
            return self._sums(model, tokens, batch)
        return self._guarded_sums(model, tokens, batch, self._vocab)

    def _guarded_sums(self, model: nn.Module, tokens: Tensor, batch: Batch, vocab: int) -> LossSum:
        """The sums without waiting for the device; the total is NaN where a token is outside the vocabulary.

        CUDA's own answer to such a token ends every later call of the process, and names no reason.
        """
        known = tokens.clamp(0, vocab - 1)
        result = self._sums(model, known, batch)
        return result._replace(total=torch.where((known == tokens).all(), result.total, math.nan))

    def _sums(self, model: nn.Module, tokens: Tensor, batch: Batch) -> LossSum:
        inputs, documents, targets = tokens[:, :-1], _documents(batch.data), _targets(batch.data, tokens)  # (B, T)
        if self._model_sums:
            total = outputs(model(inputs, **documents, sum_cross_entropy_of=_without_fillers(targets, batch)))
            counted = valid_part(targets, batch)
        else:
            total, counted = _cross_entropy(outputs(model(inputs, **documents)), targets, batch)
        all_count = batch.data.keys() == {"tokens"}
        return LossSum(total, float(counted.numel()) if all_count else (counted != IGNORED).sum())

    def metrics(self) -> CausalLMMetrics:
        """A fresh accumulator for one evaluation."""
        return CausalLMMetrics()

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse data and models that do not fit, by one batch on the host.

        Raises:
            DataError: Where there are no tokens within the model's vocabulary.
            ModelError: Where the outputs are not logits for each token.
            CombinationError: Where the model cannot keep documents apart.
        """
        _check_data(batch)
        documents = _documents(batch.data)
        if documents and not _takes(model, "documents", by_keywords=True):
            raise CombinationError(
                f"the data keep documents apart, and {type(model).__name__}.forward takes no `documents`",
                where="data.args",
                remedy="set data.args.attend_across_documents=true (of conversations: data.args.pack=false), or use a\n"
                "model that does, such as gpt",
            )
        tokens = batch.data["tokens"]
        # Zeros, because what is to be found out is which tokens the model knows.
        inputs = torch.zeros_like(tokens[:, :-1])
        sums = _takes(model, "sum_cross_entropy_of")
        if sums:
            _check_sum(try_on(model, inputs, **documents, sum_cross_entropy_of=inputs))
            # One token tells the vocabulary, and logits of all would be what such a model avoids.
            inputs, documents = inputs[:1, :1], {name: part[:1, :1] for name, part in documents.items()}
        logits = outputs(try_on(model, inputs, **documents))
        if logits.ndim != 3 or logits.shape[:2] != inputs.shape:
            raise ModelError(
                f"the model returns {describe(logits)} for tokens {describe(inputs)}",
                where="model",
                remedy="return logits (samples, tokens, vocabulary)",
            )
        self._vocab, self._model_sums = logits.shape[2], sums
        self._check_tokens(tokens, batch)

    def check_data(self, dataset: Dataset) -> None:
        """Refuse data with tokens that the model does not know, where the data tell.

        Raises:
            DataError: Naming the largest.
        """
        check_tokens(dataset, self._vocab)

    def _check_tokens(self, tokens: Tensor, batch: Batch) -> None:
        if self._vocab is None:
            return
        for row, column in ((tokens < 0) | (tokens >= self._vocab)).nonzero().tolist():
            raise DataError(
                f"token {tokens[row, column]} of {sample(batch.indices, row)} is outside "
                f"the model's vocabulary of {self._vocab}",
                where="data",
                remedy="make model.args.vocab the tokenizer's number of tokens",
            )


def _documents(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model gets besides tokens."""
    return {"documents": data["documents"][:, :-1]} if "documents" in data else {}


def _targets(data: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    targets = data.get("targets", tokens[:, 1:])
    if "documents" not in data:
        return targets
    documents = data["documents"]
    return targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)


def _without_fillers(targets: Tensor, batch: Batch) -> Tensor:
    """Targets (B, T), of which those of samples that only fill up do not count."""
    if batch.num_valid == len(targets):
        return targets
    counted = targets.clone()
    counted[batch.num_valid :] = IGNORED
    return counted


def _cross_entropy(logits: Tensor, targets: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum over the samples that count, and their targets (n · T,)."""
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise mismatch(logits, targets)
    logits = at_least_fp32(valid_part(logits, batch)).flatten(0, 1)  # (n · T, V)
    targets = valid_part(targets, batch).flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), targets


def _takes(model: nn.Module, name: str, *, by_keywords: bool = False) -> bool:
    """Whether a model's forward has this argument, or, if that is enough, takes any keyword."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or (by_keywords and any(p.kind == p.VAR_KEYWORD for p in parameters.values()))


def _check_sum(answer: Any) -> None:
    if not isinstance(answer, Tensor) or answer.ndim:
        raise ModelError(
            f"the model returns {describe(answer)} when it is asked for a sum of cross-entropies",
            where="model",
            remedy="let forward(…, sum_cross_entropy_of=targets) return a tensor of shape ()",
        )


def _check_data(batch: Batch) -> None:
    data = batch.data
    tokens = data.get("tokens") if isinstance(data, Mapping) else None
    fits = isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.shape[1] > 1
    if tokens is None or not fits:
        raise DataError(
            f"the data give {describe(data)}, and causal_lm needs {{tokens: int64[samples, context + 1]}}",
            where="data.name",
            remedy="use data of tokens: text, tokens, or a dataset of your own",
        )
    shapes = {"documents": tokens.shape, "targets": tokens[:, 1:].shape}
    for name, shape in shapes.items():
        if name in data and data[name].shape != shape:
            raise DataError(f"{name} is {describe(data[name])}, not of shape {list(shape)}", where="data")


class CausalLMMetrics:
    """The mean loss of a token, its exponential (the perplexity), and the number of tokens that counted."""

    def __init__(self) -> None:
        from bigtrain.tasks.metrics import LossMean  # torchmetrics takes long to import: not before a step

        self._mean = LossMean()
        self._mean.update(LossSum(torch.zeros(()), 0.0))  # else torchmetrics warns of a state without one

    def to(self, device: torch.device) -> CausalLMMetrics:
        """Move the accumulated state."""
        self._mean.to(device)
        return self

    def update(self, result: LossSum, batch: Batch) -> None:
        """Add one microbatch."""
        self._mean.update(result)

    def compute(self) -> dict[str, Any]:
        """Sum over all ranks and return numbers by name. Every rank must call it."""
        mean = self._mean.compute()
        loss = mean["loss"]
        return {"loss": loss.item(), "perplexity": loss.exp().item(), "tokens": int(mean["count"].item())}
