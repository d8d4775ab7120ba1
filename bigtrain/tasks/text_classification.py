"""Classification of texts: that of anything else, with a closer look at what goes into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bigtrain.errors import DataError
from bigtrain.protocols import Batch, Dataset
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.inspection import check_tokens, pair
from bigtrain.tasks.tensors import describe


class TextClassification(Classification):
    """Batches are (inputs, labels): what the model takes by name, each (B, T) int64, and integers (B,).

    Among the inputs are `input_ids`. The model returns logits (B, classes).

    Args:
        num_classes: As for `Classification`, and so are the others.
        label_smoothing: The share of each target that is spread evenly over all classes.
        class_weights: A weight for each class, or `balanced`.
        ignore_index: A label whose samples count in no loss and no metric.
    """

    takes_mixtures = False

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ignore_index=ignore_index,
        )
        self._vocab: int | None = None  # of the model, known once `check` ran
        self._pad: int | None = None  # what it takes for a row's filling
        self._names: list[str] = []  # of its outputs

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse data and models that do not fit, by one batch on the host.

        Raises:
            DataError: Where the data are no tokenized texts, or hold a token that the model does not know.
            ModelError: Where the model's outputs are not logits of as many classes as were asked for.
        """
        inputs, _ = pair(batch, "text, label")
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
            raise DataError(
                f"the data give {describe(inputs)}, and text_classification needs "
                "{input_ids: int64[samples, tokens], …}",
                where="data.name",
                remedy="use the data text_classification, or a dataset of your own with such samples",
            )
        self._vocab = getattr(getattr(model, "config", None), "vocab_size", None)
        self._pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._names = [str(name) for name in getattr(getattr(model, "config", None), "id2label", {}).values()]
        super().check(model, batch)

    def check_data(self, dataset: Dataset) -> None:
        """Refuse data of more classes than the model has outputs, or in another order, and of tokens unknown to it.

        A decoder's head looks at the last token of a text, which it finds by the one that fills rows up.

        Raises:
            DataError: Naming what does not fit.
        """
        super().check_data(dataset)
        names = [str(name) for name in getattr(dataset, "class_names", None) or ()]
        if names != self._names and sorted(names) == sorted(self._names):
            raise DataError(
                f"the data have the classes {', '.join(names)} in this order, and the model's own head has "
                f"{', '.join(self._names)}",
                where="data.args.labels",
                remedy=f"set data.args.labels to [{', '.join(self._names)}]",
            )
        check_tokens(dataset, self._vocab)
        pad = getattr(getattr(dataset, "base", dataset), "pad", None)
        if None not in (pad, self._pad) and pad != self._pad:
            raise DataError(
                f"the tokenizer fills rows up with token {pad}, and the model takes {self._pad} for that: what it says "
                "of a text may depend on the texts beside it",
                where="model.args.config",
                remedy=f"set model.args.config: {{pad_token_id: {pad}}}",
            )
