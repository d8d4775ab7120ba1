"""Text for language models: tokenized when the run starts (`text`), or before (`tokens`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.fingerprints import Digest
from bigtrain.data.folder_tokenizers import load_tokenizer
from bigtrain.data.text_files import find_documents
from bigtrain.data.token_files import open_tokens
from bigtrain.data.tokenizers import Tokenizer, token_type, tokenize
from bigtrain.data.windows import Windows
from bigtrain.errors import DataError


def text(
    split: str, *, source: str, context: int, tokenizer: str = "bytes", attend_across_documents: bool = True
) -> Windows:
    """Windows into text that is tokenized now and kept in memory; each file is a document.

    Args:
        split: Not used: which files are evaluated on is said by their own source, or is a share of these.
        source: A file, a folder, a pattern of paths, or `python-stdlib`.
        context: How many tokens a model sees at once.
        tokenizer: `bytes`, or the .json file of a tokenizer.
        attend_across_documents: False adds to each token the number of its document.

    Raises:
        DataError: If there is no such text or tokenizer, or too little of it.
    """
    encoder = load_tokenizer(tokenizer, where="data.args.tokenizer")
    tokens, documents = _tokenize(source, encoder)

    def fingerprint() -> str:
        return str(Digest(tokens, documents, encoder.fingerprint))

    return Windows(
        tokens,
        context=context,
        vocab_size=encoder.vocab_size,
        documents=None if attend_across_documents else documents,
        fingerprint=fingerprint,
    )


def tokens(split: str, *, path: str, context: int, attend_across_documents: bool = True) -> Windows:
    """Windows into token ids that `bigtrain data pack` wrote, read by memory map.

    Args:
        split: Not used: which files are evaluated on is said by their own path, or is a share of these.
        path: The folder.
        context: How many tokens a model sees at once.
        attend_across_documents: False adds to each token the number of its document.

    Raises:
        DataError: If the folder is missing or damaged, or has too few tokens.
    """
    files = open_tokens(path, where="data.args.path")
    return Windows(
        files.tokens,
        context=context,
        vocab_size=files.meta.vocab_size,
        documents=None if attend_across_documents else files.documents,
        fingerprint=files.fingerprint,
    )


def _tokenize(source: str, encoder: Tokenizer) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """All ids, and where each document begins in them."""
    pieces, begins = [], []
    for ids, begins_document in tokenize(encoder, find_documents(source, where="data.args.source")):
        pieces.append(ids.astype(token_type(encoder)))
        begins.append(begins_document)
    if not pieces:
        raise DataError(
            f"the text of {source!r} is empty",
            where="data.args.source",
            remedy="give files that have text in them",
        )
    positions = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    return np.concatenate(pieces), positions[np.array(begins)].astype(np.uint64)
