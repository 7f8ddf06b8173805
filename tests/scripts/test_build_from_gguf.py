"""build_from_gguf.py: merges from ranks split a text as the greedy algorithm of sentencepiece does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/research"
MERGED = ["he", "▁h", "ll", "▁he", "llo", "▁hello", "lo", "el", "ell", "oh"]
LETTERS = list("▁helo")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import build_from_gguf

    return build_from_gguf


def greedy(text: str, ranks: dict[str, int]) -> list[str]:
    """Join the pair of neighbours whose joint token comes first, the leftmost of equals, until none is left."""
    parts = list(text)
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not pairs:
            return parts
        _, place = min(pairs)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def fields(special: Sequence[str]) -> dict[str, Any]:
    tokens = ["<unk>", "<bos>", "<eos>", *special, *MERGED, *LETTERS]
    ranks = [-float(number) for number in range(len(MERGED) + len(LETTERS))]
    control = [3, 3, 3, *([4] * len(special))]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [-1000.0] * len(control) + ranks,
        "token_type": control + [1] * len(ranks),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    }


def test_texts_are_split_as_sentencepiece_merges_them(build: Any) -> None:
    tokenizer = build.sentencepiece_tokenizer(fields([]))
    ranks = {token: number for number, token in enumerate(MERGED)}
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(" helo") for _ in range(draw.randint(1, 24)))
        assert tokenizer(text).tokens() == ["<bos>", *greedy(text.replace(" ", "▁"), ranks)]


def test_tokens_of_the_user_are_found_in_normalized_text_longest_first(build: Any) -> None:
    tokenizer = build.sentencepiece_tokenizer(fields(["▁▁", "▁▁▁"]))
    assert tokenizer("he   hello  o").tokens() == ["<bos>", "he", "▁▁▁", "he", "llo", "▁▁", "o"]
    assert tokenizer.decode(tokenizer("he   hello  o", add_special_tokens=False).input_ids) == "he   hello  o"
