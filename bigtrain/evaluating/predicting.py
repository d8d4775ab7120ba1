"""What a trained model says of inputs that are in no dataset: a class for a picture, the rest for a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.data import create, token_files
from bigtrain.data.paths import missing
from bigtrain.data.tokenizers import Tokenizer, load_tokenizer
from bigtrain.data.transforms import Transformed
from bigtrain.errors import CombinationError, DataError, UserError
from bigtrain.evaluating.trained import Trained, refuse_given
from bigtrain.protocols import Dataset
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.tensors import at_least_fp32, outputs

_FILE = "@"  # before the path of a file that holds a prompt


@dataclass(frozen=True)
class Generating:
    """How a text is gone on with.

    Attributes:
        max_tokens: The most tokens to add.
        temperature: What logits are divided by before one is drawn; 0 takes the likeliest.
        seed: Of the drawing.
        tokenizer: `bytes` or a tokenizer's file, instead of the one of the run file.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0
    tokenizer: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What came of one input.

    Attributes:
        input: A file, or a prompt.
        answer: By name, in the order in which it is to be shown.
    """

    input: str
    answer: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """One flat row."""
        return {"input": self.input, **self.answer}


def predict(trained: Trained, inputs: Sequence[str], generating: Generating = Generating()) -> Iterator[Prediction]:
    """What the model says of each input, in order.

    Args:
        trained: The model.
        inputs: Pictures' files for a classification; for a language model prompts, or `@file` with one in it.
        generating: How a text is gone on with.

    Raises:
        UserError: Where the task is neither of both.
        DataError: Where a file is missing or no picture, or a prompt does not fit the model; the input is named.
    """
    if isinstance(trained.task, Classification):
        return _classes(trained, inputs)
    if isinstance(trained.task, CausalLM):
        return _texts(trained, inputs, generating)
    raise UserError(
        f"the task {trained.config.task.name} cannot predict from the command line",
        where="task.name",
        remedy="classification takes pictures and causal_lm takes text; for others open the checkpoint in Python:\n"
        "with bigtrain.evaluating.opened(path) as trained: trained.model(…)",
    )


# ---- pictures ----------


def _classes(trained: Trained, inputs: Sequence[str]) -> Iterator[Prediction]:
    config = trained.config
    refuse_given(config, "data")
    data: Any = create(config.data.name, "train", config.data.args)
    names = getattr(data, "class_names", None)
    shape = _sample(Transformed(data, config.data.transforms.eval, where="data.transforms.eval"), "the data").shape
    size = config.data.batch_size
    for start in range(0, len(inputs), size):
        paths = [Path(path) for path in inputs[start : start + size]]
        images = torch.stack([_image(path, data, shape, trained) for path in paths])
        images = images.to(trained.world.device, trained.dtype())
        with trained.evaluating():
            shares = at_least_fp32(outputs(trained.model(images))).softmax(1)
        best, labels = (part.tolist() for part in shares.max(1))
        for path, probability, label in zip(paths, best, labels, strict=True):
            name = names[label] if names and label < len(names) else str(label)
            yield Prediction(str(path), {"class": str(name), "probability": round(probability, 6), "label": label})


def _sample(data: Dataset, what: str) -> Tensor:
    sample = data[0]
    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise CombinationError(
            f"{what} are no pictures (channels, height, width)",
            where="data.name",
            remedy="bigtrain predict classifies pictures; for others open the checkpoint in Python:\n"
            "with bigtrain.evaluating.opened(path) as trained: trained.model(…)",
        )
    return image


class _One:
    """A picture as the data would have it, before transforms."""

    def __init__(self, picture: Any) -> None:
        self._picture = picture

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self._picture


def _image(path: Path, data: Any, shape: torch.Size, trained: Trained) -> Tensor:
    """A file as the model takes it: as the data would have read it, in their channels and size."""
    picture = _read(path)
    if hasattr(data, "from_picture"):
        made = data.from_picture(picture)
    elif getattr(data, "has_pillow_images", False):
        made = picture.convert(data[0][0].mode)
    else:
        raise CombinationError(
            f"the data {trained.config.data.name} do not say how a picture becomes one of their samples",
            where="data.name",
            remedy="give the dataset a method from_picture(image), which makes of an image of Pillow what its samples "
            "begin with",
        )
    transforms = trained.config.data.transforms.eval
    image = _sample(Transformed(_One(made), transforms, where="data.transforms.eval"), str(path))
    if image.shape != shape and not isinstance(made, Tensor):
        made = made.resize(data[0][0].size)
        image = _sample(Transformed(_One(made), transforms, where="data.transforms.eval"), str(path))
    if image.shape != shape:
        raise DataError(
            f"{str(path)!r} becomes {tuple(image.shape)}, and the data are {tuple(shape)}",
            where=str(path),
            remedy="let data.transforms.eval end in one size: Resize with {size: [height, width]}",
        )
    return image


def _read(path: Path) -> Any:
    from PIL import Image, ImageOps

    if not path.is_file():
        raise missing(path, "the file of a picture", where="INPUT")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{str(path)!r} is no picture that can be read: {error}",
            where=str(path),
            remedy="give PNG or JPEG files",
        ) from error


# ---- text ----------


def _texts(trained: Trained, inputs: Sequence[str], how: Generating) -> Iterator[Prediction]:
    tokenizer, context = _tokenizer(trained, how), _context(trained)
    prompts = [_prompt(text) for text in inputs]
    for prompt in prompts:
        ids = tokenizer.encode_text(prompt)
        if not ids or len(ids) > context:
            raise DataError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, and the model takes 1 to {context}",
                where="INPUT",
                remedy="shorten it: the end of a text says most about what follows" if ids else "give some text",
            )
        generator = torch.Generator().manual_seed(how.seed)
        added = list(_continue(trained, ids, context, how, generator, tokenizer.separator))
        yield Prediction(prompt, {"continuation": tokenizer.decode(added), "tokens": len(added)})


def _continue(
    trained: Trained,
    ids: list[int],
    context: int,
    how: Generating,
    generator: torch.Generator,
    end: int | None,
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
        if token == end:
            return
        seen.append(token)
        yield token


def _prompt(text: str) -> str:
    if not text.startswith(_FILE):
        return text
    path = Path(text.removeprefix(_FILE))
    if not path.is_file():
        raise missing(path, "the file of a prompt", where="INPUT")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is no text: {error}", where=str(path), remedy="give UTF-8 text") from error


def _tokenizer(trained: Trained, how: Generating) -> Tokenizer:
    data = trained.config.data
    wanted = how.tokenizer or data.args.get("tokenizer")
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
            f"the data {data.name} name no tokenizer", where="--tokenizer", remedy="give `bytes` or a tokenizer.json"
        )
    return load_tokenizer(wanted or "bytes", where="--tokenizer" if how.tokenizer else "data.args.tokenizer")


def _context(trained: Trained) -> int:
    found = getattr(trained.model, "context", None) or trained.config.data.args.get("context")
    if not isinstance(found, int):
        raise DataError("neither the model nor the data say how long a context is", where="data.args.context")
    return found
