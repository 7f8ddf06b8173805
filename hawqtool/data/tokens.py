"""Fixed token rows from the documents of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from hawqtool.data.sources import FIELDS, Record, Source
from hawqtool.data.tokenizer import encode, frame, render
from hawqtool.errors import InputError
from hawqtool.records import Rows

_BYTE_ORDER_MARK = "\ufeff"
CHARACTERS_PER_TOKEN = 16
"""Characters read per token that is needed, at first; four times what common text takes."""


def source_rows(
    tokenizer: Any, source: Source, num_rows: int, seq_len: int, seed: int, sentences: bool = False
) -> Tensor:
    """Whole rows of a source, at least ``num_rows`` where it holds them.

    Texts are joined by newlines and tokenized as one, so it does not matter in which kind of file they lie; token
    ids are concatenated. No more is read than the rows are likely to need, and twice as much when they need more.

    Every row of text begins as the tokenizer begins a text (``<bos>`` of Gemma and Llama; nothing of GPT-2 and Qwen):
    models that learned with such a token put their largest activations there, and are lost without it. Token ids of
    running text are taken as they are: whoever made them has decided that.

    Args:
        tokenizer: Tokenizer of the model.
        source: Its records are consumed.
        num_rows: Rows that are needed.
        seq_len: Tokens per row.
        seed: With 0 rows stand in the source's order, so that other tools can be given the same rows; any other
            seed shuffles those that were read.
        sentences: Whether each row stands between the tokenizer's special tokens, as encoders expect. All special
            tokens count in ``seq_len``.

    Returns:
        ``[rows, seq_len]`` int64.

    Raises:
        InputError: If a record cannot be used.
    """
    with closing(source.records):  # releases files and connections of what is not read to its end
        corpus = _Corpus(tokenizer, source)
        before, after = frame(tokenizer) if sentences or not corpus.holds_ids() else ([], [])
        after = after if sentences else []
        length = seq_len - len(before) - len(after)
        if length < 1:
            raise InputError(f"rows of {seq_len} tokens leave no room beside the special tokens; raise --seq-len")
        # Running text has them once at its end, where there are none to begin each row with.
        corpus.special_tokens = not sentences and not before
        limit = CHARACTERS_PER_TOKEN * num_rows * length
        tokens = corpus.tokens(limit)
        while len(tokens) < num_rows * length and not corpus.exhausted(limit):
            limit *= 2
            tokens = corpus.tokens(limit)
    if before and not sentences and tokens[: len(before)] == before:
        tokens = tokens[len(before) :]  # a chat template wrote them already
    count = len(tokens) // length
    rows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    rows = torch.cat([_repeated(before, count), rows, _repeated(after, count)], dim=1)
    if seed and count:
        rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return rows


class _Corpus:
    """The documents of a source as one text, or as one list of token ids, as far as they were read."""

    def __init__(self, tokenizer: Any, source: Source) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.special_tokens = False
        self.parts: list[str] = []
        self.ids: list[int] = []
        self.size = 0
        self.ended = False

    def tokens(self, limit: int) -> list[int]:
        """Tokens of the first ``limit`` characters; an id counts as a character."""
        while self.size < limit and not self.ended:
            self._read()
        if not self.parts:
            return self.ids[:limit]
        text = "\n".join(self.parts)[:limit]
        return encode(self.tokenizer, text, self.special_tokens)

    def holds_ids(self) -> bool:
        """Whether the first record that says something holds token ids."""
        while not (self.parts or self.ids or self.ended):
            self._read()
        return bool(self.ids)

    def exhausted(self, limit: int) -> bool:
        """Whether the first ``limit`` characters are all."""
        return self.ended and self.size <= limit

    def _read(self) -> None:
        record = next(self.source.records, None)
        if record is None:
            self.ended = True
            return
        part = document(record, self.tokenizer)
        if part is None:
            self.source.left_out += 1
            return
        if self.parts if isinstance(part, list) else self.ids:
            raise InputError(f"{record.place}: text and input_ids are mixed in one source; give them as two sources")
        if isinstance(part, list):
            self.ids += part
            self.size = len(self.ids)
        else:
            self.size += len(part) + bool(self.parts)
            self.parts.append(part)


def _repeated(ids: list[int], count: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64).expand(count, len(ids))


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of shape and tokens, or pixels."""
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    digest.update(rows.to(torch.float32 if rows.is_floating_point() else torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def overlap(sets: Mapping[str, Rows]) -> int:
    """Number of rows that occur in more than one set."""
    seen: dict[bytes, str] = {}
    shared = 0
    for name, rows in sets.items():
        for row in rows.tokens:
            shared += seen.setdefault(row.numpy().tobytes(), name) != name
    return shared


def document(record: Record, tokenizer: Any) -> str | list[int] | None:
    """The text of a record, or its token ids; None where its fields are null, as tables have them.

    Args:
        record: Holds ``text``, ``messages`` (rendered with the chat template) or ``input_ids``.
        tokenizer: Has the chat template and the vocabulary.

    Raises:
        InputError: If it holds none of them, or one that cannot be used; names the record's place.
    """
    place, value = record.place, record.value
    if not isinstance(value, dict):
        raise InputError(f"{place}: found {type(value).__name__}, expected an object with {', '.join(FIELDS)}")
    field = next((name for name in FIELDS if value.get(name) is not None), None)
    if field is None:
        if any(name in value for name in FIELDS):
            return None
        found = f"the keys {', '.join(map(str, value))}" if value else "no key"
        raise InputError(f"{place}: found {found}, expected one of {', '.join(FIELDS)}")
    if field == "input_ids":
        return _token_ids(value[field], len(tokenizer), place)
    text = value[field] if field == "text" else _rendered(value[field], tokenizer, place)
    if not isinstance(text, str):
        raise InputError(f"{place}: text is {type(text).__name__}, expected a string")
    text = text.removeprefix(_BYTE_ORDER_MARK)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: character {error.start} of the text is half a surrogate pair; repair it") from error
    return text


def _token_ids(ids: Any, vocabulary: int, place: str) -> list[int]:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InputError(f"{place}: input_ids is no list of integers")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(f"{place}: token {wrong} is outside the vocabulary, which is 0 to {vocabulary - 1}")
    return ids


def _rendered(messages: Any, tokenizer: Any, place: str) -> str:
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise InputError(f"{place}: messages is no list of objects with role and content")
    if not tokenizer.chat_template:
        raise InputError(f"{place}: holds messages, but the tokenizer has no chat template; give rendered text")
    # Tables fill keys that a message lacks with nulls, which templates would take for given.
    given = [{k: part for k, part in message.items() if part is not None or k == "content"} for message in messages]
    return render(tokenizer, given, place)


def _is_message(message: Any) -> bool:
    """Whether it has a role, and content or the calls of tools that stand in its place."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))
