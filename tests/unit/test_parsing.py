"""JSON and YAML of unknown origin: what is taken, and that each bomb is refused quickly with one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hawqtool.parsing import (
    MAX_DEPTH,
    MAX_LINE,
    MAX_YAML_BYTES,
    ParseError,
    load_json,
    parse_json,
    parse_yaml,
    printable,
    read_bounded,
    short,
    shown,
    terminal_line,
)

JSON_BOMBS = {
    "deep lists": ("[" * 100_000 + "]" * 100_000, "inside each other"),
    "deeper than can be written": ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "inside each other"),
    "deep objects": ('{"a":' * 5000 + "1" + "}" * 5000, "inside each other"),
    "an integer of many digits": ('{"a":' + "9" * 1_000_000 + "}", "4300"),
    "a key twice": ('{"a":1,"b":2,"a":3}', "names a twice"),
    "a key twice, below": ('[{"x\\u001b":1,"x\\u001b":3}]', r"names x\\x1b twice"),
    "half a surrogate pair": ('{"a": ["\\ud800"]}', r"'\\ud800' with half"),
    "half a surrogate pair in a key": ('{"\\uDC00": 1}', "half a surrogate pair"),
    "cut": ('{"a":1', "delimiter"),
    "nothing": ("", "Expecting value"),
    "not UTF-8": (b"\xff{}", "utf-8"),
    "many values": ("[" + "[]," * 2000 + "[]]", "more than the 1,000 values"),
}

YAML_BOMBS = {
    "aliases that multiply": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "line 2 uses an alias",
    ),
    "an alias of itself": ("&a a: *a\n", "line 1 uses an alias"),
    "a tag": ("x: !!python/object/apply:os.system ['true']\n", "line 1 uses a tag"),
    "a harmless tag": ("\nx: !!int '3'\n", "line 2 uses a tag"),
    "a key twice": ("seed: 1\nbits: 4\nseed: 2\n", "line 3 names seed twice"),
    "a key twice, below": ("a:\n  b: 1\n  b: 2\n", "line 3 names b twice"),
    "too large": ("#" * (MAX_YAML_BYTES + 1), "more than the 256,000 bytes"),
    "deep": ("[" * 100_000, "inside each other"),
    "deeper than can be shown": ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "inside each other"),
    "an integer of many digits": ("a: " + "9" * 100_000, "4300"),
    "a date that cannot be": ("a: 2020-99-99", "month"),
    "a number beyond floats": ("a: " + "59:" * 400 + "0.5", "float"),
    "half a surrogate pair": ('a: "\\ud800"', "half a surrogate pair"),
    "two documents": ("a: 1\n---\nb: 2\n", "single document"),
    "not UTF-8": (b"a: \xff", "utf-8"),
}


def encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ParseError, match="it is a pipe or a device"):
        read_bounded(tmp_path / "pipe.json", 100)


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_bombs(name: str) -> None:
    text, said = JSON_BOMBS[name]
    begin = time.process_time()
    with pytest.raises(ParseError, match=said) as caught:
        parse_json(encoded(text), max_values=1000 if name == "many values" else 10_000_000)
    assert time.process_time() - begin < 5 and str(caught.value).isprintable() and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_bombs(name: str) -> None:
    text, said = YAML_BOMBS[name]
    begin = time.process_time()
    with pytest.raises(ParseError, match=said) as caught:
        parse_yaml(encoded(text))
    assert time.process_time() - begin < 10 and str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_what_is_plain_is_taken() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"a": NaN}}')["a"] == [1, 2.5, None, True, "é"]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_yaml("a: [1, 2.5, ~, yes, 'é']\nb: {a: 1}\nc: |\n  x\n".encode()) == {
        "a": [1, 2.5, None, True, "é"],
        "b": {"a": 1},
        "c": "x\n",
    }
    assert parse_yaml(b"") is None


def test_files_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(1 << 40)  # takes no space, and would take a terabyte of memory
    with pytest.raises(ParseError, match="more than the 1,000 bytes"):
        read_bounded(large, 1000)
    with pytest.raises(ParseError, match="bytes that are allowed"):
        load_json(large)
    with pytest.raises(ParseError, match="No such file"):
        load_json(tmp_path / "none")
    with pytest.raises(ParseError, match="null"):
        load_json(Path("a\0b"))
    (tmp_path / "exact").write_bytes(b"[1]")
    assert read_bounded(tmp_path / "exact", 3) == b"[1]"


def test_what_reaches_a_terminal_is_printable() -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\u202ec\u2066d\r\n\x9be\ud800é"
    assert printable(hostile) == r"a\x1b[2J\x1b]0;title\x07b\u202ec\u2066d\r\n\x9be\ud800é"
    assert printable("plain é 中") == "plain é 中"
    assert shown(hostile).isprintable() and shown(10**5000) == "int of thousands of digits"
    assert len(shown("x" * 10**6)) == len(short("x" * 10**6)) == 120
    os.fsencode(printable(hostile))


def test_lines_are_bounded_also_where_characters_are_spelled_out() -> None:
    assert terminal_line("short \x1b") == r"short \x1b"
    assert len(terminal_line("\x1b" * 10**6)) == len(terminal_line("x" * 10**6)) == MAX_LINE
