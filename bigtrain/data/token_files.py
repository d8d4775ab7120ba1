"""Token ids on disk, written once by `bigtrain data pack` and read by memory map.

A folder of three files, without pickle:

    tokens.bin      the ids of all documents, one after another: uint16 or uint32, little-endian
    documents.bin   where each document begins in them: uint64, little-endian
    meta.json       how many of both, the type, the vocabulary, the tokenizer, an XXH3-128 of each

A document that has no tokens is left out. Where the tokenizer has an id for it, that id ends every document.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.data.fingerprints import Digest
from bigtrain.data.folder_tokenizers import load_tokenizer
from bigtrain.data.paths import missing
from bigtrain.data.text_files import find_documents
from bigtrain.data.tokenizers import Tokenizer, token_type, tokenize
from bigtrain.errors import DataError

FORMAT = "bigtrain-tokens-1"
_TOKENS, _DOCUMENTS, _META = "tokens.bin", "documents.bin", "meta.json"
_SAMPLED_CHUNKS, _CHUNK = 16, 1 << 16  # how many places of a file its fingerprint looks at, and bytes in each


@dataclass(frozen=True)
class Meta:
    """What meta.json holds.

    Attributes:
        format: Names the layout and its version.
        dtype: uint16 or uint32.
        num_tokens: How many ids there are.
        num_documents: How many documents.
        vocab_size: Every id is below it.
        separator: The id that ends each document, if there is one.
        tokenizer: Its name.
        tokenizer_fingerprint: Changes when the tokenizer does.
        tokens_hash: XXH3-128 of tokens.bin.
        documents_hash: XXH3-128 of documents.bin.
    """

    format: str
    dtype: str
    num_tokens: int
    num_documents: int
    vocab_size: int
    separator: int | None
    tokenizer: str
    tokenizer_fingerprint: str
    tokens_hash: str
    documents_hash: str


@dataclass(frozen=True)
class TokenFiles:
    """An opened folder.

    Attributes:
        meta: What it says of itself.
        tokens: A memory map of all ids.
        documents: A memory map of where documents begin, uint64.
    """

    meta: Meta
    tokens: NDArray[Any]
    documents: NDArray[np.uint64]

    def fingerprint(self) -> str:
        """A hash of the length, of chunks spread over the ids, and of the hashes taken when written."""
        digest = Digest(f"{self.meta.tokens_hash} {self.meta.documents_hash} {len(self.tokens)}")
        step = _CHUNK // self.tokens.itemsize
        for begin in np.linspace(0, max(len(self.tokens) - step, 0), _SAMPLED_CHUNKS, dtype=np.int64).tolist():
            digest.add(self.tokens[begin : begin + step])
        return str(digest)


def open_tokens(path: str | Path, *, where: str) -> TokenFiles:
    """Open a folder that `pack` wrote.

    Raises:
        DataError: If it is not there, is not such a folder, or its files are not as long as they should be.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise missing(folder, "a folder written by `bigtrain data pack`", where=where)
    meta = _read_meta(folder, where)
    tokens = _map(folder / _TOKENS, np.dtype(meta.dtype), meta.num_tokens, where)
    return TokenFiles(meta, tokens, _map(folder / _DOCUMENTS, np.dtype("uint64"), meta.num_documents, where))


def _read_meta(folder: Path, where: str) -> Meta:
    try:
        found = json.loads((folder / _META).read_text(encoding="utf-8"))
        meta = Meta(**{field.name: found[field.name] for field in fields(Meta)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(folder / _META)!r} cannot be read: {type(error).__name__}: {error}",
            where=where,
            remedy="give a folder written by `bigtrain data pack`, or write it again",
        ) from error
    counts = (meta.num_tokens, meta.num_documents, meta.vocab_size)
    if meta.format != FORMAT or meta.dtype not in ("uint16", "uint32") or not all(type(n) is int for n in counts):
        raise DataError(
            f"{str(folder)!r} holds {meta.format!r} of {meta.dtype!r}, {counts}; it should hold {FORMAT!r}",
            where=where,
            remedy="write it again with `bigtrain data pack`",
        )
    return meta


def _map(path: Path, dtype: np.dtype[Any], count: int, where: str) -> NDArray[Any]:
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize or count == 0:
        raise DataError(
            f"{str(path)!r} has {size} bytes; {_META} says {count} × {dtype.itemsize}",
            where=where,
            remedy="copy it again, or write it again with `bigtrain data pack`",
        )
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        # Windows are read in random order: what the kernel reads around one helps the next only if it stays in memory.
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype=dtype.newbyteorder("<"))


def pack(
    source: str,
    out: str | Path,
    tokenizer: str = "bytes",
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Meta:
    """Write text as token ids, in memory that does not grow with the text.

    Args:
        source: As for the data `text`: a file, a folder, a pattern of paths, or `python-stdlib`. A file is a
            document.
        out: The folder to write; it appears when all is written, and must not exist.
        tokenizer: `bytes`, or the .json file of a tokenizer.
        on_progress: Called now and then with the number of documents and tokens so far.

    Returns:
        What was written.

    Raises:
        DataError: If there is no such text or tokenizer, `out` exists, or the text has no tokens.
    """
    target = Path(out)
    if target.exists():
        raise DataError(
            f"{str(target)!r} exists already", where="OUT", remedy="give another folder, or delete this one"
        )
    documents = find_documents(source, where="SOURCE")
    encoder = load_tokenizer(tokenizer, where="--tokenizer")
    with _appears_when_done(target) as folder:
        meta = _write(folder, documents, encoder, on_progress or (lambda documents, tokens: None))
        if meta.num_tokens == 0:
            raise DataError(
                f"the text of {source!r} is empty", where="SOURCE", remedy="give files that have text in them"
            )
        with (folder / _META).open("w", encoding="utf-8") as file:
            json.dump(asdict(meta), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    return meta


@contextmanager
def _appears_when_done(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name at the end, and is removed if anything fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp makes it private
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{str(target)!r} cannot be written: {error}",
            where="OUT",
            remedy="check the disk's space and the folder's rights",
        ) from error


def _write(
    folder: Path, documents: Sequence[Path], tokenizer: Tokenizer, on_progress: Callable[[int, int], None]
) -> Meta:
    dtype = token_type(tokenizer)
    num_tokens = num_documents = 0
    with _HashedFile(folder / _TOKENS) as tokens, _HashedFile(folder / _DOCUMENTS) as starts:
        for ids, begins in tokenize(tokenizer, documents):
            if begins:
                starts.write(np.array([num_tokens], dtype="<u8"))
                num_documents += 1
            tokens.write(ids.astype(dtype))
            num_tokens += len(ids)
            on_progress(num_documents, num_tokens)
    return Meta(
        format=FORMAT,
        dtype=dtype.name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokens_hash=tokens.digest.hexdigest(),
        documents_hash=starts.digest.hexdigest(),
    )


class _HashedFile:
    """A new file that is hashed while it is written, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.digest = xxhash.xxh3_128()
        self._file = path.open("wb")

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, values: NDArray[Any]) -> None:
        self.digest.update(values.data)
        self._file.write(values.data)
