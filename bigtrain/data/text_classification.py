"""Texts with labels, from CSV or JSONL: tokenized when the run starts, kept as ids in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.fingerprints import Digest
from bigtrain.data.folder_tokenizers import FolderTokenizer, tokenizer_of
from bigtrain.data.rows import Row, bad_row, read_rows, text_of
from bigtrain.errors import DataError
from bigtrain.named import suggest

_log = logging.getLogger(__name__)

_AT_ONCE = 1024  # texts that are tokenized together


class LabelledTexts:
    """Sample i is ({input_ids, …} of shape (tokens,), its label); a batch is filled up to its longest.

    Args:
        ids: All ids, text after text.
        types: Which text of a pair each belongs to; None where the model is not told.
        ends: Where each text ends in them.
        labels: The class of each.
        class_names: The classes.
        pad: The id that fills rows up.
        fill_to: How long every batch is; None: as long as its longest text.
        fingerprint: Of the tokenizer.
    """

    is_random = False

    def __init__(
        self,
        ids: NDArray[np.uint32],
        types: NDArray[np.uint8] | None,
        ends: NDArray[np.int64],
        labels: NDArray[np.int64],
        class_names: list[str],
        *,
        pad: int,
        fill_to: int | None,
        fingerprint: str,
    ) -> None:
        self._ids, self._types, self._ends = ids, types, ends
        self._begins = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
        self._labels = self.labels = labels
        self.pad, self._fill_to, self._of_tokenizer = pad, fill_to, fingerprint
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.largest_token = int(ids.max())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        part = slice(self._begins[index], self._ends[index])
        inputs = {"input_ids": torch.from_numpy(self._ids[part].astype(np.int64))}
        if self._types is not None:
            inputs["token_type_ids"] = torch.from_numpy(self._types[part].astype(np.int64))
        return inputs, torch.tensor(self._labels[index])

    def collate(self, samples: Sequence[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of one length, filled up at their ends; `attention_mask` says what is text."""
        return together([inputs for inputs, _ in samples], self.pad, self._fill_to), torch.stack(
            [label for _, label in samples]
        )

    def fingerprint(self) -> str:
        """Changes with any text, label or class, and with the tokenizer."""
        types = np.zeros(0) if self._types is None else self._types
        return str(Digest(self._ids, types, self._ends, self._labels, repr(self.class_names), self._of_tokenizer))


def together(texts: Sequence[dict[str, Tensor]], pad: int, fill_to: int | None = None) -> dict[str, Tensor]:
    """Texts of different lengths as one batch, each tensor (samples, tokens)."""
    lengths = [len(text["input_ids"]) for text in texts]
    size = fill_to or max(lengths)
    batch = {
        name: torch.stack([_filled(text[name], size, pad if name == "input_ids" else 0) for text in texts])
        for name in texts[0]
    }
    mask = torch.arange(size)[None, :] < torch.tensor(lengths)[:, None]  # (samples, tokens)
    return {**batch, "attention_mask": mask.long()}


def _filled(values: Tensor, size: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)), value=filler)


def text_classification(
    split: str,
    *,
    path: str,
    tokenizer: str | None = None,
    text: str | Sequence[str] = "text",
    label: str = "label",
    labels: Sequence[Any] | None = None,
    max_tokens: int = 512,
    padding: str = "longest",
) -> LabelledTexts:
    """Labelled texts of a .csv, .tsv or .jsonl file.

    Args:
        split: Not used: the texts to evaluate on have a path of their own, or are a share of these.
        path: The file.
        tokenizer: A Hugging Face folder; null: that of the model `hf/<folder>`.
        text: The column of the text; or two, of a pair of texts.
        label: The column of the label.
        labels: The labels in the order of the classes; null: those that come in the file, sorted, whole numbers by
            their size.
        max_tokens: Longer texts are cut, and their number is said.
        padding: longest: a batch is as long as its longest text; full: every batch has `max_tokens`, which
            compiling asks for.

    Raises:
        DataError: Naming file, line and remedy, where a row cannot be used.
    """
    columns = [text] if isinstance(text, str) else list(text)
    _check_arguments(columns, max_tokens, padding)
    encoder = tokenizer_of(tokenizer)
    places: list[str] = []
    said: list[str] = []
    pieces, cut = [], 0
    for rows in _in_groups(read_rows(Path(path).expanduser(), [*columns, label], where="data.args.path")):
        texts = [[text_of(row, column) for row in rows] for column in columns]
        places += [row.place for row in rows]
        said += [_label_of(row, label) for row in rows]
        found = encoder.encode_texts(texts[0], texts[1] if len(texts) > 1 else None, max_tokens)
        pieces += [(np.array(ids, np.uint32), np.array(types, np.uint8)) for ids, types in found]
        cut += _num_cut(encoder, texts, found, max_tokens)
    if not pieces:
        raise DataError(f"{path!r} has no rows", where="data.args.path", remedy="give a file with labelled texts")
    _tell_cut(cut, len(pieces), max_tokens)
    names = [str(each) for each in labels] if labels is not None else _sorted(set(said))
    _check_names(names, labels is not None)
    return LabelledTexts(
        np.concatenate([ids for ids, _ in pieces]),
        np.concatenate([types for _, types in pieces]) if encoder.wants_types() else None,
        np.cumsum([len(ids) for ids, _ in pieces]),
        _numbers(said, places, names),
        names,
        pad=encoder.pad,
        fill_to=max_tokens if padding == "full" else None,
        fingerprint=encoder.fingerprint,
    )


def _check_arguments(columns: list[Any], max_tokens: object, padding: object) -> None:
    if len(columns) not in (1, 2) or not all(isinstance(column, str) for column in columns):
        raise DataError(
            f"text: {columns!r} names no column, nor a pair of them",
            where="data.args.text",
            remedy="give one column, or two as in [question, answer]",
        )
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 2:
        raise DataError(
            f"max_tokens is {max_tokens!r}", where="data.args.max_tokens", remedy="give a whole number of at least 2"
        )
    if padding not in ("longest", "full"):
        raise DataError(f"padding is {padding!r}", where="data.args.padding", remedy="give longest or full")


def _in_groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == _AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _label_of(row: Row, column: str) -> str:
    value = row.values[column]
    if isinstance(value, str) and value.strip() and value != value.strip():  # it would be a class beside the other
        raise bad_row(row.place, f"the label {value!r} has spaces at its ends", "take them out")
    if isinstance(value, (int, bool)) or (isinstance(value, str) and value.strip()):
        return str(value)
    said = "is empty" if value in ("", None) or isinstance(value, str) else f"is {value!r}, neither a word nor a number"
    raise bad_row(row.place, f"the label {column!r} {said}", "give it a label, or take the row out")


def _num_cut(encoder: FolderTokenizer, texts: list[list[str]], found: Sequence[Any], max_tokens: int) -> int:
    """How many of these texts were longer than what was kept of them: only those that fill it can be."""
    full = [position for position, (ids, _) in enumerate(found) if len(ids) >= max_tokens]
    longer = [[column[position] for position in full] for column in texts]
    if not full:
        return 0
    whole = encoder.encode_texts(longer[0], longer[1] if len(longer) > 1 else None, 1 << 30)
    return sum(len(ids) > max_tokens for ids, _ in whole)


def _tell_cut(cut: int, of: int, max_tokens: int) -> None:
    if cut and os.environ.get("RANK", "0") == "0":
        _log.warning("%d of %d texts are longer than data.args.max_tokens, %d: they were cut", cut, of, max_tokens)


def _sorted(words: set[str]) -> list[str]:
    return sorted(words, key=int) if all(word.isdecimal() for word in words) else sorted(words)


def _check_names(names: list[str], are_given: bool) -> None:
    if len(set(names)) != len(names):
        raise DataError(
            f"labels: {names} has a label twice", where="data.args.labels", remedy="name each label once, in order"
        )
    if len(names) < 2:
        raise DataError(
            f"there is nothing to tell apart: the only label is {names[0]!r}" if names else "there are no labels",
            where="data.args.labels" if are_given else "data.args.label",
            remedy="name the right column (data.args.label), or give all labels (data.args.labels)",
        )


def _numbers(said: list[str], places: list[str], names: list[str]) -> NDArray[np.int64]:
    number = {name: position for position, name in enumerate(names)}
    for word, place in zip(said, places, strict=True):
        if word not in number:
            raise bad_row(
                place,
                f"the label {word!r} is none of the {len(names)} of data.args.labels",
                suggest(word, names, "labels") + "\ncorrect it, or add it to data.args.labels and to the head",
            )
    return np.array([number[word] for word in said], dtype=np.int64)
