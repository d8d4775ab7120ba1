"""Conversations for instruction tuning, from JSONL: in the model's own chat template, the answers to be learnt.

Several short ones share a row, each a document of its own: tokens attend to nothing outside it.
"""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.fingerprints import Digest
from bigtrain.data.folder_tokenizers import FolderTokenizer, tokenizer_of
from bigtrain.data.rows import Row, bad_row, read_rows
from bigtrain.errors import DataError

_log = logging.getLogger(__name__)

_IGNORED = -100  # torch's default for a target that does not count
_ANSWERS = "assistant"  # the role whose messages are to be learnt


class Conversation(NamedTuple):
    """A conversation as ids.

    Attributes:
        ids: Shape (tokens,).
        is_answer: Shape (tokens,): which of them are to be learnt.
    """

    ids: NDArray[np.uint32]
    is_answer: NDArray[np.bool_]


class Conversations:
    """Sample i is a row of one or several conversations.

    A batch is {"tokens": (samples, T + 1), "targets": (samples, T)} and, where rows hold several, "documents" like
    tokens, the number of each id's conversation; all int64. Targets are -100 but for the answers. T is `context` where
    rows are packed, else what the longest of the batch needs.

    Args:
        found: The conversations.
        rows: Which of them each row holds, in this order.
        context: How many ids a model sees at once.
        packs: Whether rows may hold several.
        pad: The id that fills rows up.
        fingerprint: Of the tokenizer.
    """

    is_random = False

    def __init__(
        self,
        found: Sequence[Conversation],
        rows: Sequence[Sequence[int]],
        *,
        context: int,
        packs: bool,
        pad: int,
        fingerprint: str,
    ) -> None:
        self.context, self._packs, self._pad, self._of_tokenizer = context, packs, pad, fingerprint
        order = [number for row in rows for number in row]
        self._ids = np.concatenate([found[number].ids for number in order])
        self._is_answer = np.concatenate([found[number].is_answer for number in order])
        self._ends = np.cumsum([len(found[number].ids) for number in order])  # of conversations
        self._row_ends = np.cumsum([len(row) for row in rows])  # in conversations
        self.largest_token = int(self._ids.max())
        self.num_conversations = len(found)

    def __len__(self) -> int:
        return len(self._row_ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = int(self._row_ends[index - 1]) if index else 0
        ends = self._ends[first : int(self._row_ends[index])]
        begin = int(self._ends[first - 1]) if first else 0
        part = slice(begin, int(ends[-1]))
        tokens = torch.from_numpy(self._ids[part].astype(np.int64))
        targets = tokens.masked_fill(torch.from_numpy(~self._is_answer[part]), _IGNORED)[1:]
        if not self._packs:
            return {"tokens": tokens, "targets": targets}
        lengths = torch.from_numpy(np.diff(ends - begin, prepend=0))
        return {
            "tokens": tokens,
            "targets": targets,
            "documents": torch.arange(len(lengths)).repeat_interleave(lengths),
        }

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of one length; what fills them up at their ends is a document of its own, and no target."""
        size = self.context + 1 if self._packs else max(len(sample["tokens"]) for sample in samples)
        return {
            name: torch.stack([self._filled(name, sample[name], size - (name == "targets")) for sample in samples])
            for name in samples[0]
        }

    def _filled(self, name: str, values: Tensor, size: int) -> Tensor:
        fillers = {"tokens": self._pad, "targets": _IGNORED, "documents": int(values[-1]) + 1 if len(values) else 0}
        return torch.nn.functional.pad(values, (0, size - len(values)), value=fillers[name])

    def fingerprint(self) -> str:
        """Changes with the conversations, with how they share rows, and with the tokenizer."""
        words = f"{self.context} {self._packs} {self._of_tokenizer}"
        return str(Digest(self._ids, self._is_answer, self._ends, self._row_ends, words))


def conversations(
    split: str,
    *,
    path: str,
    context: int,
    tokenizer: str | None = None,
    messages: str = "messages",
    learn: str = "all",
    pack: bool = True,
    too_long: str = "stop",
) -> Conversations:
    """Conversations of a .jsonl file: `{"messages": [{"role": "user", "content": "…"}, …]}` on each line.

    Args:
        split: Not used: the conversations to evaluate on have a path of their own, or are a share of these.
        path: The file.
        context: How many tokens a model sees at once.
        tokenizer: A Hugging Face folder with a chat template; null: that of the model `hf/<folder>`.
        messages: The key of the messages.
        learn: all: every answer (`assistant`); last: the last one alone.
        pack: Whether conversations share rows.
        too_long: What to do with those that do not fit the context: stop, skip them, or cut them at their end;
            their number is said.

    Raises:
        DataError: Naming file, line and remedy, where a conversation cannot be used.
    """
    _check_arguments(context, learn, pack, too_long)
    encoder = tokenizer_of(tokenizer)
    if encoder.library.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer!r} has no chat template",
            where="data.args.tokenizer",
            remedy="take the folder of a model that was tuned for conversations; or put a chat_template.jinja into it",
        )
    found = _read(encoder, path, context, messages, learn, too_long)
    lengths = [len(conversation.ids) for conversation in found]
    rows = packed(lengths, context + 1) if pack else [[number] for number in range(len(found))]
    return Conversations(found, rows, context=context, packs=pack, pad=encoder.pad, fingerprint=encoder.fingerprint)


def _read(
    encoder: FolderTokenizer, path: str, context: int, messages: str, learn: str, too_long: str
) -> list[Conversation]:
    found, shortened = [], 0
    for row in read_rows(Path(path).expanduser(), [messages], where="data.args.path"):
        said = _messages_of(row, messages)
        conversation = _encode(encoder, said, row, learn)
        if len(conversation.ids) > context + 1:
            shortened += 1
            if too_long == "stop":
                raise bad_row(
                    row.place,
                    f"the conversation has {len(conversation.ids)} tokens, and {context + 1} fit",
                    "give a larger data.args.context, or set data.args.too_long to skip or cut",
                )
            if too_long == "skip":
                continue
            conversation = Conversation(conversation.ids[: context + 1], conversation.is_answer[: context + 1])
            if not conversation.is_answer[1:].any():
                continue  # nothing to learn is left
        found.append(conversation)
    if not found:
        raise DataError(
            f"{path!r} has no conversations" + (" that fit" if shortened else ""),
            where="data.args.path",
            remedy="give a file with some, or a larger data.args.context",
        )
    if shortened and os.environ.get("RANK", "0") == "0":
        what = "left out" if too_long == "skip" else "cut at their end"
        _log.warning("%d conversations are longer than data.args.context, %d: they were %s", shortened, context, what)
    return found


def _check_arguments(context: object, learn: object, pack: object, too_long: object) -> None:
    if not isinstance(context, int) or isinstance(context, bool) or context < 2:
        raise DataError(
            f"context is {context!r}", where="data.args.context", remedy="give a number of tokens, at least 2"
        )
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "learn": (learn, ("all", "last")),
        "pack": (pack, (True, False)),
        "too_long": (too_long, ("stop", "skip", "cut")),
    }
    for name, (value, words) in allowed.items():
        if value not in words:
            remedy = f"give {', '.join(str(word).lower() for word in words)}"
            raise DataError(f"{name} is {value!r}", where=f"data.args.{name}", remedy=remedy)


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which share a row, so that few rows are needed: the longest first, each where it leaves the least room.

    Best-fit decreasing needs at most 11/9 of the fewest rows possible, and one more (Johnson, Near-optimal bin packing
    algorithms, 1973).

    Args:
        lengths: How long each is, at most `room`.
        room: How long a row is.

    Returns:
        The numbers in each row; rows in the order of their first numbers.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # its keys, in order
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(rooms, lengths[number])
        if place < len(rooms):
            left = rooms[place]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
            rows[row].append(number)
        else:
            left, row = room, len(rows)
            rows.append([number])
        left -= lengths[number]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return sorted(sorted(row) for row in rows)


def _messages_of(row: Row, key: str) -> list[dict[str, Any]]:
    """The messages of a row, if they are some and one of them is an answer."""
    found = row.values[key]
    form = f'write {{"{key}": [{{"role": "user", "content": "…"}}, {{"role": "{_ANSWERS}", "content": "…"}}]}}'
    if not isinstance(found, list) or not found:
        raise bad_row(row.place, f"{key!r} holds no messages", form)
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_row(row.place, f"message {number} has no role", form)
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise bad_row(row.place, f"message {number}, of {message['role']!r}, has no text as its content", form)
    if all(message["role"] != _ANSWERS for message in found):
        roles = ", ".join(sorted({message["role"] for message in found}))
        raise bad_row(row.place, f"there is no answer to learn: the roles are {roles}", form)
    return found


def _encode(encoder: FolderTokenizer, said: list[dict[str, Any]], row: Row, learn: str) -> Conversation:
    """A conversation's ids, and which of them begin within an answer.

    An answer is what the template writes after the words that ask for it, up to the end of the turn, which says that
    the answer is over. A greeting that a conversation begins with answers nothing.
    """
    text = _rendered(encoder, said, row, prompts=False)
    answers = [number for number, message in enumerate(said) if message["role"] == _ANSWERS and number]
    if not answers:
        raise bad_row(row.place, "its only answer comes first: nothing asks for it", "put the question before it")
    spans = []
    for number in answers if learn == "all" else answers[-1:]:
        before = _rendered(encoder, said[:number], row, prompts=True)
        after = _rendered(encoder, said[: number + 1], row, prompts=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise bad_row(
                row.place,
                f"the chat template writes message {number + 1} otherwise in a longer conversation than in one that "
                "ends with it, so that what is to be learnt cannot be told from the rest",
                "set data.args.learn=last; or write one conversation for each answer"
                if learn == "all" and number != answers[-1]
                else "take out what the template leaves out (an earlier thought), or change chat_template.jinja",
            )
        spans.append((len(before), len(after)))
    ids, places = encoder.encode_with_places(text)
    begins = np.array([begin for begin, _ in places])
    is_answer = np.zeros(len(ids), dtype=np.bool_)
    for begin, end in spans:
        is_answer |= (begins >= begin) & (begins < end)
    if not is_answer[1:].any():
        raise bad_row(row.place, "no token of an answer is left", "give the answer a text")
    return Conversation(np.array(ids, dtype=np.uint32), is_answer)


def _rendered(encoder: FolderTokenizer, said: Sequence[Mapping[str, Any]], row: Row, *, prompts: bool) -> str:
    try:
        return encoder.render(said, prompts=prompts)
    except Exception as error:  # a template raises what it likes, and so does jinja
        raise bad_row(
            row.place,
            f"the chat template refuses the conversation: {error}",
            "give roles in the order that it asks for: mostly user and assistant in turn, a system message first",
        ) from error
