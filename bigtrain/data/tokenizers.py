"""From text to token ids: bytes as they are, a tokenizer file of the tokenizers library, or a folder that has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.data.paths import missing
from bigtrain.errors import DataError

_PIECE = 1 << 20  # how much of a document is tokenized at once, in bytes or characters
_PIECES = 16  # how many pieces a tokenizer file is given at once, to spread over its threads
# What well-known tokenizers call the end of a document; the first one that a vocabulary has is taken.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What turns documents into ids.

    Attributes:
        name: `bytes`, or the name of the file.
        vocab_size: Every id is below it.
        separator: The id that ends each document; None where the vocabulary has none for it.
        fingerprint: Changes when the tokenizer does.
    """

    name: str
    vocab_size: int
    separator: int | None
    fingerprint: str

    def encode(self, documents: Sequence[Path]) -> Iterator[tuple[NDArray[Any], bool]]:
        """The ids of the documents in pieces of bounded size, and whether each piece ends its document."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, without what ends a document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; those that stand for none are left out."""


class Bytes:
    """A token for each of the 256 bytes, and one that ends a document."""

    name = "bytes"
    vocab_size = 257
    separator: int | None = 256
    fingerprint = "bytes"

    def encode(self, documents: Sequence[Path]) -> Iterator[tuple[NDArray[Any], bool]]:
        """The bytes of the files."""
        for path in documents:
            with _opened(path, "rb") as file:
                while piece := file.read(_PIECE):
                    yield np.frombuffer(piece, dtype=np.uint8), False
            yield np.empty(0, dtype=np.uint8), True

    def encode_text(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return bytes(each for each in ids if each < 256).decode(errors="replace")


class FromFile:
    """A tokenizer of the tokenizers library, saved as JSON.

    Text is UTF-8; a byte order mark is none of it. A document longer than 2^20 characters is tokenized in pieces, cut
    where a line ends.

    Args:
        path: The file.
        where: The key of the run file, for errors.

    Raises:
        DataError: If there is no such file, or it is no tokenizer.
    """

    def __init__(self, path: Path, *, where: str) -> None:
        from tokenizers import Tokenizer as Library

        if not path.is_file():
            raise missing(path, "`bytes`, the .json file of a tokenizer, or a folder with one", where=where)
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise DataError(
                f"{str(path)!r} is no tokenizer: {error}",
                where=where,
                remedy="give a tokenizer.json, as the tokenizers library saves it",
            ) from error
        self.name = path.name
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.separator = next((id_ for t in _SEPARATORS if (id_ := self._library.token_to_id(t)) is not None), None)
        self.fingerprint = xxhash.xxh3_128_hexdigest(path.read_bytes())

    def encode(self, documents: Sequence[Path]) -> Iterator[tuple[NDArray[Any], bool]]:
        """The ids of the files' text, without the special tokens that a template would add."""
        waiting: list[tuple[str, bool]] = []
        size = 0
        for text, ends in _text(documents):
            waiting.append((text, ends))
            size += len(text)
            if size >= _PIECE * _PIECES:
                yield from self._encode(waiting)
                waiting, size = [], 0
        yield from self._encode(waiting)

    def _encode(self, pieces: list[tuple[str, bool]]) -> Iterator[tuple[NDArray[Any], bool]]:
        encodings = self._library.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, pieces, strict=True):
            yield np.array(encoding.ids, dtype=np.uint32), ends

    def encode_text(self, text: str) -> list[int]:
        """The ids of the text, without the special tokens that a template would add."""
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self._library.decode(list(ids), skip_special_tokens=True))


def _text(documents: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """Pieces of text, cut where a line ends if it is not longer than a piece, and whether each ends its document."""
    for path in documents:
        rest = ""
        try:
            with _opened(path, "r", encoding="utf-8-sig", newline="") as file:
                while read := file.read(_PIECE):
                    text = rest + read
                    cut = text.rfind("\n") + 1 or len(text)
                    yield text[:cut], False
                    rest = text[cut:]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{str(path)!r} is not UTF-8 text: {error}",
                remedy="leave it out (a pattern such as 'folder/**/*.txt' chooses files), convert it, or\n"
                "use tokenizer: bytes",
            ) from error
        yield rest, True


def _opened(path: Path, mode: str, **options: Any) -> IO[Any]:
    try:
        return path.open(mode, **options)
    except OSError as error:
        raise DataError(
            f"text cannot be read: {error}", where=str(path), remedy="check the file and its rights"
        ) from error


def token_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def tokenize(tokenizer: Tokenizer, documents: Sequence[Path]) -> Iterator[tuple[NDArray[Any], bool]]:
    """The ids of documents in pieces, never empty, and whether each begins a document.

    Each document ends with the separator, if there is one; a document without ids is left out.
    """
    begins = True
    for ids, ends in tokenizer.encode(documents):
        if len(ids):
            yield ids, begins
            begins = False
        if ends and not begins:
            if tokenizer.separator is not None:
                yield np.array([tokenizer.separator]), False
            begins = True
