"""From a record to text or token ids."""

from __future__ import annotations

from typing import Any

from hawqtool.data.sources import FIELDS, Record
from hawqtool.errors import InputError


def document(record: Record, tokenizer: Any) -> str | list[int]:
    """The text of a record, or its token ids.

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
        found = f"the keys {', '.join(map(str, value))}" if value else "no key"
        raise InputError(f"{place}: found {found}, expected one of {', '.join(FIELDS)}")
    if field == "input_ids":
        return _token_ids(value[field], len(tokenizer), place)
    text = value[field] if field == "text" else _rendered(value[field], tokenizer, place)
    if not isinstance(text, str):
        raise InputError(f"{place}: text is {type(text).__name__}, expected a string")
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
    from jinja2 import TemplateError

    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise InputError(f"{place}: messages is no list of objects with role and content")
    if not tokenizer.chat_template:
        raise InputError(f"{place}: holds messages, but the tokenizer has no chat template; give rendered text")
    # Tables fill keys that a message lacks with nulls, which templates would take for given.
    given = [{key: part for key, part in message.items() if part is not None} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{place}: the chat template refuses these messages: {reason}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content") is not None
