"""What a trained model says of a text: its class, the rest of it, or an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.catalogue import hugging_face_folder
from bigtrain.data import token_files, with_tokenizer
from bigtrain.data.folder_tokenizers import FolderTokenizer, load_tokenizer, tokenizer_of
from bigtrain.data.paths import missing
from bigtrain.data.text_classification import together
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.errors import CombinationError, DataError
from bigtrain.evaluating.answers import Prediction
from bigtrain.evaluating.trained import Trained
from bigtrain.tasks.tensors import at_least_fp32, outputs

CLASSIFIED, CONVERSATIONS = "text_classification", "conversations"
_FILE = "@"  # before the path of a file that holds a text


@dataclass(frozen=True)
class Generating:
    """How a text is gone on with.

    Attributes:
        max_tokens: The most tokens to add.
        temperature: What logits are divided by before one is drawn; 0 takes the likeliest.
        seed: Of the drawing.
        tokenizer: `bytes`, a tokenizer's file or folder, instead of the one of the run file.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0
    tokenizer: str | None = None


def classes_of(trained: Trained, inputs: Sequence[str], tokenizer: str | None) -> Iterator[Prediction]:
    """The class of each text.

    Raises:
        DataError: Where a file is missing, or a text is empty.
        CombinationError: Where the model was trained on pairs of texts.
    """
    args = _args(trained)
    if not isinstance(args.get("text", ""), str):
        raise CombinationError(
            "the model tells apart pairs of texts, and one at a time is given here",
            where="data.args.text",
            remedy="put them into a file: bigtrain eval --data 'eval={name: text_classification, args: {path: …}}'",
        )
    encoder = tokenizer_of(tokenizer or args.get("tokenizer"))
    names = trained.kept.get("class_names") or args.get("labels") or ()
    texts = [_text(text) for text in inputs]
    size = trained.config.data.batch_size
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        empty = next((text for text in part if not text.strip()), None)
        if empty is not None:
            raise DataError("a text is empty", where="INPUT", remedy="give some text")
        encoded = encoder.encode_texts(part, None, args.get("max_tokens", 512))
        rows = [{"input_ids": torch.tensor(ids), "token_type_ids": torch.tensor(types)} for ids, types in encoded]
        if not encoder.wants_types():
            rows = [{"input_ids": row["input_ids"]} for row in rows]
        batch = {name: value.to(trained.world.device) for name, value in together(rows, encoder.pad).items()}
        with trained.evaluating():
            shares = at_least_fp32(outputs(trained.model(batch))).softmax(1)
        best, labels = (each.tolist() for each in shares.max(1))
        for text, probability, label in zip(part, best, labels, strict=True):
            name = str(names[label]) if label < len(names) else str(label)
            yield Prediction(text, {"class": name, "probability": round(probability, 6), "label": label})


def continuations_of(trained: Trained, inputs: Sequence[str], how: Generating) -> Iterator[Prediction]:
    """How the model goes on with each prompt; the answer to it, where it was trained on conversations.

    Raises:
        DataError: Where a file is missing, or a prompt does not fit the model.
    """
    context = _context(trained)
    tokenizer = _tokenizer(trained, how)
    answers = trained.config.data.name == CONVERSATIONS and isinstance(tokenizer, FolderTokenizer)
    ends = {tokenizer.separator} if tokenizer.separator is not None else set()
    for prompt in [_text(text) for text in inputs]:
        if answers:
            assert isinstance(tokenizer, FolderTokenizer)
            ids, ends = tokenizer.encode_prompt(prompt), tokenizer.ends_of_answers()
        else:
            ids = tokenizer.encode_text(prompt)
        if not ids or len(ids) > context:
            raise DataError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, and the model takes 1 to {context}",
                where="INPUT",
                remedy="shorten it: the end of a text says most about what follows" if ids else "give some text",
            )
        generator = torch.Generator().manual_seed(how.seed)
        added = list(_continue(trained, ids, context, how, generator, ends))
        yield Prediction(
            prompt, {"answer" if answers else "continuation": tokenizer.decode(added), "tokens": len(added)}
        )


def _args(trained: Trained) -> dict[str, Any]:
    """What the data were built with, and the model's own tokenizer where they name none."""
    data = trained.config.data
    return dict(with_tokenizer(data.name, data.args, hugging_face_folder(trained.config.model.name)))


def _continue(
    trained: Trained,
    ids: list[int],
    context: int,
    how: Generating,
    generator: torch.Generator,
    ends: Collection[int],
) -> Iterator[int]:
    """Tokens one by one, each from the last `context` ones before it, up to the end of the document."""
    seen = list(ids)
    for _ in range(how.max_tokens):
        tokens = torch.tensor([seen[-context:]], device=trained.world.device)
        with trained.evaluating():
            logits = at_least_fp32(outputs(trained.model(tokens)))[0, -1].cpu()  # (vocabulary,)
        if how.temperature:
            token = int(torch.multinomial((logits / how.temperature).softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token in ends:
            return
        seen.append(token)
        yield token


def _text(text: str) -> str:
    if not text.startswith(_FILE):
        return text
    path = Path(text.removeprefix(_FILE))
    if not path.is_file():
        raise missing(path, "the file of a text", where="INPUT")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is no text: {error}", where=str(path), remedy="give UTF-8 text") from error


def _tokenizer(trained: Trained, how: Generating) -> Tokenizer:
    data = trained.config.data
    wanted = how.tokenizer or _args(trained).get("tokenizer")
    if data.name == "tokens":
        meta = token_files.open_tokens(data.args["path"], where="data.args.path").meta
        if wanted is None and meta.tokenizer != "bytes":
            raise DataError(
                f"the data were packed with the tokenizer {meta.tokenizer}, of which only the name is known",
                where="--tokenizer",
                remedy=f"give its file: --tokenizer path/to/{meta.tokenizer}",
            )
        found = load_tokenizer(wanted or "bytes", where="--tokenizer")
        if found.fingerprint != meta.tokenizer_fingerprint:
            raise DataError(
                f"{wanted!r} is not the tokenizer that the data were packed with, {meta.tokenizer}",
                where="--tokenizer",
                remedy="give the very file",
            )
        return found
    if wanted is None and data.name != "text":
        raise DataError(
            f"the data {data.name} name no tokenizer",
            where="--tokenizer",
            remedy="give `bytes`, a tokenizer.json, or a folder with one",
        )
    return load_tokenizer(wanted or "bytes", where="--tokenizer" if how.tokenizer else "data.args.tokenizer")


def _context(trained: Trained) -> int:
    found = getattr(trained.model, "context", None) or trained.config.data.args.get("context")
    if not isinstance(found, int):
        raise DataError("neither the model nor the data say how long a context is", where="data.args.context")
    return found
