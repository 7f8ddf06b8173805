"""Tokenizers and chat templates that fail: each ends in one line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from hawqtool.data import tokenizer as module
from hawqtool.data.tokenizer import encode, frame, load_tokenizer, render
from hawqtool.errors import InputError
from tests.support.tiny import tiny_tokenizer

TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DAMAGED_MAP = base64.b64encode((16).to_bytes(4, "little") + b"\xff" * 16 + b"\0").decode()
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder, False)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


def test_a_good_tokenizer_is_loaded(folder: Path) -> None:
    assert encode(load_tokenizer(folder, False), "a b", False) == tiny_tokenizer()("a b").input_ids


def test_usual_normalizers_are_taken(folder: Path) -> None:
    parts = [{"type": "Prepend", "prepend": "_"}, TWICE | {"content": "_"}, {"type": "NFKC"}]
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": parts})
    assert load_tokenizer(folder, False) is not None


@pytest.mark.parametrize(
    ("normalizer", "said"),
    [
        ({"type": "Sequence", "normalizers": [TWICE] * 40}, "may make 1.1e+12 characters of one; expected at most"),
        (TWICE | {"pattern": {"Regex": ""}, "content": "a" * 2000}, "may make 2e+03 characters of one"),
        ({"type": "Precompiled", "precompiled_charsmap": DAMAGED_MAP}, "has no tokenizer that transformers can load"),
    ],
)
def test_normalizers_that_grow_or_panic_are_refused(folder: Path, normalizer: dict[str, Any], said: str) -> None:
    edit(folder / "tokenizer.json", normalizer=normalizer)
    assert said in refusal(folder)


def test_a_length_that_is_text_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length="x")
    assert "has no tokenizer that transformers can load" in refusal(folder)


class Failing:
    """A tokenizer that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self.error


def test_a_tokenizer_that_fails_on_a_text() -> None:
    with pytest.raises(InputError, match=r"fails on this text: KeyError: 'x'; check"):
        encode(Failing(KeyError("x")), "a", True)
    with pytest.raises(InputError, match="does not tell its special tokens"):
        frame(Failing(RuntimeError("\n")))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(3)])
def test_what_is_no_fault_of_the_tokenizer_goes_on(error: BaseException) -> None:
    with pytest.raises(type(error)):
        encode(Failing(error), "a", True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0].nothing.more }}", "has no attribute"),
        ("{% for %}", "xpected"),
        ("{{ 'x' * -1 + 3 }}", "TypeError"),
        ("{{ (messages[0].content ~ 'b').encode('ascii').decode('x') }}", "LookupError: unknown encoding"),
    ],
)
def test_a_template_that_fails_names_the_record(template: str, said: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        render(tokenizer, CHAT, "chats.jsonl, line 3")
    assert str(caught.value).startswith("chats.jsonl, line 3: the chat template refuses these messages: ")
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEMPLATE_SECONDS", 0.3)
    tokenizer = tiny_tokenizer()
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop
    with pytest.raises(InputError, match=r"no end after 0\.3 seconds"):
        render(tokenizer, CHAT, "chats.jsonl, line 3")
