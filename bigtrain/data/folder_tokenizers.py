"""The tokenizer of a Hugging Face folder, through transformers: texts with the tokens that a model expects around them.

transformers is an extra, imported only here. Nothing of a folder is ever run but the chat template, in the sandbox in
which transformers renders it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.data.paths import missing
from bigtrain.data.tokenizers import Bytes, FromFile, Tokenizer
from bigtrain.errors import DataError, SetupError

FILE = "tokenizer.json"
_OTHERS = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


class FolderTokenizer(FromFile):
    """What a folder says of how text becomes tokens; it serves plain text as a tokenizer file does.

    Args:
        path: The folder.
        where: The key of the run file, for errors.

    Attributes:
        library: transformers' own.
        pad: The id that fills rows up: the padding token's, or where there is none the one that ends a text.

    Raises:
        DataError: Where the folder has no tokenizer, or one that cannot be read.
        SetupError: Where transformers is not installed.
    """

    def __init__(self, path: Path, *, where: str) -> None:
        check_folder(path, where=where)
        self.library: Any = _load(path, where)
        super().__init__(path / FILE, where=where)
        self.name = path.name
        self.vocab_size = max(self.vocab_size, len(self.library))
        self.separator = self.library.eos_token_id if self.library.eos_token_id is not None else self.separator
        self.fingerprint = _fingerprint(path, self.library)
        found = (self.library.pad_token_id, self.library.eos_token_id, self.library.sep_token_id)
        self.pad: int = next((id_ for id_ in found if id_ is not None), 0)

    def encode_texts(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_tokens: int
    ) -> list[tuple[list[int], list[int]]]:
        """The ids of texts, or of pairs of them, with special tokens; and which text of a pair each belongs to.

        What is longer is cut, a pair's longer part first.
        """
        batch = self.library(
            list(texts),
            list(pairs) if pairs is not None else None,
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
        return list(zip(batch["input_ids"], batch["token_type_ids"], strict=True))

    def wants_types(self) -> bool:
        """Whether the model is told which text of a pair a token belongs to."""
        return "token_type_ids" in self.library.model_input_names

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompts: bool) -> str:
        """A conversation as the chat template writes it.

        Args:
            messages: Each with a role and a content.
            prompts: Whether what begins an answer follows.
        """
        rendered: str = self.library.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompts)
        return rendered

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that a user's message, and what asks for an answer to it, have in the chat template."""
        return self.encode_with_places(self.render([{"role": "user", "content": text}], prompts=True))[0]

    def ends_of_answers(self) -> set[int]:
        """The ids after which an answer is over: what the chat template writes there, and what ends any text."""
        found = {self.separator} if self.separator is not None else set()
        whole = self.render([{"role": "user", "content": "."}, {"role": "assistant", "content": "x"}], prompts=False)
        after = self.encode_with_places(whole[whole.rindex("x") + 1 :])[0][:1]
        return found | {id_ for id_ in after if id_ in self.library.added_tokens_decoder}

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text as it stands, without further tokens, and where each begins and ends in it."""
        encoded = self.library(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(place) for place in encoded["offset_mapping"]]


def load_tokenizer(tokenizer: str, *, where: str) -> Tokenizer:
    """A tokenizer by `bytes`, or the path of a file or of a Hugging Face folder.

    Raises:
        DataError: If there is no such tokenizer.
        SetupError: Where it is a folder, and transformers is not installed.
    """
    if tokenizer == Bytes.name:
        return Bytes()
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        return FolderTokenizer(path, where=where)
    return FromFile(path, where=where)


def tokenizer_of(folder: str | None) -> FolderTokenizer:
    """The tokenizer that data of texts name.

    Raises:
        DataError: Where there is none.
    """
    where = "data.args.tokenizer"
    if folder is None:
        raise DataError(
            "no tokenizer is named, and the model is of no folder that could have one",
            where=where,
            remedy="give a folder with a tokenizer.json",
        )
    return FolderTokenizer(Path(folder).expanduser(), where=where)


def check_folder(path: Path, *, where: str) -> None:
    """Refuse a folder without a tokenizer.

    Raises:
        DataError: Saying which file there should be.
    """
    if not path.is_dir():
        raise missing(path, "a folder with a tokenizer.json", where=where)
    if (path / FILE).is_file():
        return
    other = next((name for name in _OTHERS if (path / name).is_file()), None)
    said = f"it has {other}, which is read slowly and not here" if other else f"there is no {FILE} in it"
    convert = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    raise DataError(
        f"the folder {str(path)!r} has no tokenizer that can be used: {said}",
        where=where,
        remedy=f"write one with transformers: {convert}"
        if other
        else f"copy {FILE} and tokenizer_config.json of the model into it, or name another folder",
    )


def _load(path: Path, where: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as absent:
        if absent.name != "transformers":
            raise
        raise SetupError(
            "transformers is not installed",
            where=where,
            remedy='install the extra: pip install "bigtrain[transformers]"',
        ) from None
    try:
        library = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers have many names for it
        raise DataError(
            f"the tokenizer of {str(path)!r} cannot be read: {str(error).partition(chr(10))[0]}",
            where=where,
            remedy=f"copy {FILE} and tokenizer_config.json anew",
        ) from error
    if not getattr(library, "is_fast", False) or not len(library):
        raise DataError(
            f"the tokenizer of {str(path)!r} is a {type(library).__name__}, which does not say where tokens begin",
            where=where,
            remedy=f"give one with a {FILE}",
        )
    return library


def _fingerprint(path: Path, library: Any) -> str:
    """Changes with the vocabulary, the special tokens and the template."""
    words = json.dumps([str(library.chat_template), library.special_tokens_map], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest((path / FILE).read_bytes() + words.encode())
