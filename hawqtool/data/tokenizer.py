"""The checkpoint's tokenizer and chat template, which are code and data of others: every failure is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hawqtool.errors import HawqError, InputError, one_line
from hawqtool.parsing import ParseError, load_json, short
from hawqtool.runtime.time_limit import time_limit

TEMPLATE_SECONDS = 10.0
"""Most seconds that a chat template may take for one record; usual ones take milliseconds."""
MAX_GROWTH = 1000
"""Most characters that a normalizer may make of one; usual ones make three."""

_PROBE = "a b"
_LONGEST_REASON = 300


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Load a checkpoint's tokenizer and try it on a word.

    Args:
        folder: Checkpoint.
        trust_remote_code: Whether code from it may run.

    Raises:
        InputError: If it cannot be loaded, cannot encode, or its normalizer makes texts grow beyond measure.
    """
    from transformers import AutoTokenizer

    _refuse_growth(folder / "tokenizer.json")
    advice = "expected its files, such as tokenizer.json, beside config.json; download them again"
    with _failures(f"{folder} has no tokenizer that transformers can load", advice):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer(_PROBE, verbose=False)
    return tokenizer


def encode(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        InputError: If the tokenizer fails on it.
    """
    with _failures("the tokenizer fails on this text", "check tokenizer.json and the text"):
        return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a sequence, read off an encoded word: fast tokenizers do not tell otherwise.

    Raises:
        InputError: If the tokenizer fails, or encodes the word to nothing.
    """
    with _failures("the tokenizer does not tell its special tokens", "check tokenizer.json"):
        encoded = tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoded.input_ids, encoded.special_tokens_mask
        first, last = special.index(0), len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]


def render(tokenizer: Any, messages: list[dict[str, Any]], place: str) -> str:
    """Text of a chat, by the tokenizer's chat template.

    Raises:
        InputError: If the template fails on it, or finds no end.
    """
    what = f"{place}: the chat template refuses these messages"
    with _failures(what, "correct the record or give rendered text"), time_limit(TEMPLATE_SECONDS):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


@contextmanager
def _failures(what: str, advice: str) -> Iterator[None]:
    """Turn whatever code of others raises into an InputError of one line."""
    try:
        yield
    except (HawqError, MemoryError):
        raise
    except Exception as error:  # templates and damaged tokenizers raise errors of any type
        raise InputError(f"{what}: {short(one_line(error), _LONGEST_REASON)}; {advice}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of compiled code; no Exception, and its class has no home
            raise
        raise InputError(f"{what}: {short(one_line(error), _LONGEST_REASON)}; {advice}") from error


def _refuse_growth(path: Path) -> None:
    """Refuse normalizers whose replacements multiply a text: they would take all memory, in code that cannot stop."""
    if not path.is_file():
        return
    try:
        content = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is no tokenizer that can be loaded ({error}); download it again") from None
    growth = _growth(content.get("normalizer") if isinstance(content, dict) else None)
    if growth > MAX_GROWTH:
        raise InputError(
            f"the normalizer of {path} may make {growth:.3g} characters of one; expected at most {MAX_GROWTH}; "
            "download the tokenizer again"
        )


def _growth(normalizer: Any) -> float:
    """Most characters that a normalizer's replacements make of one."""
    if not isinstance(normalizer, dict):
        return 1.0
    parts, growth = normalizer.get("normalizers"), 1.0
    for part in parts if isinstance(parts, list) else ():
        growth = min(growth * _growth(part), 1e300)
    content, pattern = normalizer.get("content"), normalizer.get("pattern")
    if isinstance(content, str):
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        growth *= max(1.0, len(content) / len(replaced) if replaced else len(content) + 1)
    return growth
