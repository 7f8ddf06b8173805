"""Multiple-choice questions from JSON lines: input, choices and the index of the right one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.data.sources import open_source
from hawqtool.data.tokenizer import encode
from hawqtool.errors import InputError
from hawqtool.parsing import short

_EXPECTED = 'expected {"input": text, "choices": [text, text, ...], "answer": index}'


@dataclass(frozen=True)
class Question:
    """A question as a model sees it.

    Args:
        rows: Token ids of the input with each choice behind it.
        starts: For each choice the position of its first token.
        answer: Index of the right choice.
    """

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    answer: int


def read_questions(path: str, tokenizer: Any, longest: int) -> list[Question]:
    """Questions of a file.

    Input and choice are tokenized together, parted by a space unless one of them has it; the tokens that the input
    alone has as well are given, the others are scored.

    Args:
        path: File of JSON lines, or one JSON array.
        tokenizer: Of the model.
        longest: Most tokens that the model can take.

    Raises:
        InputError: If there is no such file, or a record is no question, or too long.
    """
    if Path(path).suffix not in (".jsonl", ".json", ".ndjson") or not Path(path).is_file():
        raise InputError(
            f"task {short(path)} is no JSON-lines file here; give a .jsonl file whose lines have {_EXPECTED}"
        )
    source, found = open_source(path), list[Question]()
    with closing(source.records):
        for record in source.records:
            question = _question(record.value, record.place, tokenizer)
            if (most := max(map(len, question.rows))) > longest:
                raise InputError(f"{record.place}: {most} tokens, the model takes {longest}; shorten the input")
            found.append(question)
    if not found:
        raise InputError(f"task {short(path)} has no questions; {_EXPECTED}")
    return found


def _question(value: Any, place: str, tokenizer: Any) -> Question:
    text = value.get("input") if isinstance(value, dict) else None
    choices = value.get("choices") if isinstance(value, dict) else None
    answer = value.get("answer") if isinstance(value, dict) else None
    if not isinstance(text, str) or not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{place} is no question; {_EXPECTED}")
    if len(choices) < 2 or type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(f"{place}: answer {short(str(answer))} names none of {len(choices)} choices; {_EXPECTED}")
    given = text.rstrip()
    space = text[len(given) :] or ("" if choices[0][0].isspace() or not given else " ")
    before = encode(tokenizer, given, True)
    rows = [encode(tokenizer, given + space + choice, True) for choice in choices]
    starts = [_shared(before, row) for row in rows]
    return Question(tuple(map(tuple, rows)), tuple(starts), answer)


def _shared(before: list[int], row: list[int]) -> int:
    """First token that the input alone does not have; a model predicts none before the second."""
    most = min(len(before), len(row) - 1)
    same = next((i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), most)
    return max(1, same)
