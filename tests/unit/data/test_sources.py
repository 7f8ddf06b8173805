"""Every kind of source, what it holds, and what is said of one that cannot be used."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing

from hawqtool.cli.quantize import shortened
from hawqtool.cli.session import decide_hub_access
from hawqtool.config import RunConfig
from hawqtool.data.sources import DatasetSpec, Record, is_hub, open_source, parse_dataset, public_name
from hawqtool.data.tokens import CHARACTERS_PER_TOKEN, document, fingerprint, source_rows
from hawqtool.errors import InputError
from tests.support.tiny import VOCAB_SIZE, tiny_tokenizer

LINES = ["first line", "", "  third, indented", 'a "quoted" one \\ with a backslash', *(f"line {n}" for n in range(60))]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% if m.name is defined %}!{% endif %}{% endfor %}"
CHATS = [
    [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "an answer"}] for n in range(9)
]


def json_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def kinds(folder: Path) -> dict[str, Path]:
    """The same lines in every kind of source on this machine."""
    records = [{"text": line} for line in LINES]
    (folder / "set").mkdir()
    json_lines(folder / "set/train.jsonl", records)
    (folder / "columns").mkdir()
    parquet(folder / "columns/train.parquet", records)
    (folder / "array.json").write_text(json.dumps(records, indent=1))
    for name, delimiter in (("lines.csv", ","), ("lines.tsv", "\t")):
        with (folder / name).open("w", newline="") as stream:
            table = csv.writer(stream, delimiter=delimiter)
            # An empty field is no record, so the empty line goes with the one before.
            table.writerows([["id", "text"], ["0", LINES[0] + "\n"], *([n, line] for n, line in enumerate(LINES[2:]))])
    return {
        "text": text(folder / "lines.txt", "\n".join(LINES) + "\n"),
        "no newline at the end": text(folder / "lines.rst", "\n".join(LINES)),
        "json lines": json_lines(folder / "lines.jsonl", records),
        "json": json_lines(folder / "lines.json", records),
        "json array": folder / "array.json",
        "table": folder / "lines.csv",
        "table with tabs": folder / "lines.tsv",
        "parquet": parquet(folder / "lines.parquet", records),
        "folder of json lines": folder / "set",
        "folder of parquet": folder / "columns",
    }


def rows(source: Path | str, count: int = 8, length: int = 16, seed: int = 0, **options: Any) -> Any:
    return source_rows(tiny_tokenizer(), open_source(str(source)), count, length, seed, **options)


def refusal(source: Path | str, tokenizer: Any = None) -> str:
    """What is said of a source that cannot be used: exit code 4 and one line."""
    with pytest.raises(InputError) as caught:
        source_rows(tokenizer or tiny_tokenizer(), open_source(str(source)), 8, 16, 0)
    assert caught.value.exit_code == 4
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# The same text from every kind.


@pytest.mark.parametrize("count", [1, 30, 10_000])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_kind_gives_the_same_rows(tmp_path: Path, count: int, seed: int) -> None:
    found = {kind: fingerprint(rows(path, count, seed=seed)) for kind, path in kinds(tmp_path).items()}
    assert len(set(found.values())) == 1, found


def test_rows_are_the_tokens_of_the_text(tmp_path: Path) -> None:
    tokens = tiny_tokenizer()("\n".join(LINES)).input_ids
    assert rows(kinds(tmp_path)["json lines"], 10_000).flatten().tolist() == tokens[: len(tokens) // 16 * 16]


def test_another_seed_shuffles_the_rows(tmp_path: Path) -> None:
    path = kinds(tmp_path)["text"]
    ordered, shuffled = rows(path).tolist(), rows(path, seed=1).tolist()
    assert ordered != shuffled and sorted(ordered) == sorted(shuffled)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_token_ids_are_used_as_they_are(tmp_path: Path, suffix: str) -> None:
    ids = [list(range(n, n + 20)) for n in range(10)]
    write = json_lines if suffix == ".jsonl" else parquet
    found = rows(write(tmp_path / f"ids{suffix}", [{"input_ids": part} for part in ids]))
    assert found.flatten().tolist() == sum(ids, [])[: 12 * 16]


def test_no_more_is_read_than_needed(tmp_path: Path) -> None:
    # With its newline a record is one row of 16 tokens; behind sixteen times one row nothing is looked at.
    good = [{"text": "x" * 16}, *[{"text": "x" * 15}] * (CHARACTERS_PER_TOKEN - 1)]
    path = json_lines(tmp_path / "a.jsonl", [*good, "not a record"])
    assert len(rows(path, count=1)) == CHARACTERS_PER_TOKEN
    assert "line 17" in refusal(path)


def test_more_is_read_when_a_token_takes_many_characters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["z" * 40])
    path = json_lines(tmp_path / "a.jsonl", [{"text": "z" * 40 * 16}] * 10)
    # 160 of the long tokens and 9 newlines: all must be read.
    assert source_rows(tokenizer, open_source(str(path)), 10, 16, 0).shape == (10, 16)


# Chats.


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_equal_rendering_by_hand(tmp_path: Path, suffix: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    # One message with a key that the others lack: a table fills it with nulls there.
    chats = [*CHATS, [{"role": "user", "content": "named", "name": "x"}]]
    by_hand = "\n".join(
        "".join(f"<{m['role']}>{m['content']}</s>" + "!" * ("name" in m) for m in messages) for messages in chats
    )
    write = json_lines if suffix == ".jsonl" else parquet
    path = write(tmp_path / f"chats{suffix}", [{"messages": messages} for messages in chats])
    found = source_rows(tokenizer, open_source(str(path)), 10_000, 16, 0).flatten().tolist()
    assert found == tokenizer(by_hand).input_ids[: len(found)] and len(found) > 300


def test_text_counts_before_messages_before_ids() -> None:
    tokenizer = tiny_tokenizer()
    assert document(Record("here", {"text": "a", "input_ids": [1]}), tokenizer) == "a"
    assert document(Record("here", {"text": None, "input_ids": [1]}), tokenizer) == [1]


# Special tokens.


def framed_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_special_tokens_stand_around_every_row(tmp_path: Path) -> None:
    tokenizer, path = framed_tokenizer(), kinds(tmp_path)["text"]
    found = source_rows(tokenizer, open_source(str(path)), 8, 16, 0, sentences=True)
    plain = tokenizer("\n".join(LINES), add_special_tokens=False).input_ids
    assert found.shape[1] == 16 and len(found) >= 8
    assert found[:, 0].eq(0).all() and found[:, -1].eq(1).all()
    assert found[:, 1:-1].flatten().tolist() == plain[: len(found) * 14]


def test_special_tokens_around_token_ids(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "ids.jsonl", [{"input_ids": list(range(5, 35))}])
    found = source_rows(framed_tokenizer(), open_source(str(path)), 2, 16, 0, sentences=True)
    assert found.tolist() == [[0, *range(5, 19), 1], [0, *range(19, 33), 1]]


def test_rows_of_running_text_begin_as_a_text_does(tmp_path: Path) -> None:
    tokenizer, path = framed_tokenizer(), kinds(tmp_path)["text"]
    found = source_rows(tokenizer, open_source(str(path)), 8, 16, 0)
    plain = tokenizer("\n".join(LINES), add_special_tokens=False).input_ids
    assert found.shape[1] == 16 and len(found) >= 8
    assert found[:, 0].eq(0).all() and found[:, 1:].flatten().tolist() == plain[: len(found) * 15]
    # What a chat template wrote is not written twice.
    written = text(tmp_path / "chat.txt", "<s>" + "\n".join(LINES))
    assert source_rows(tokenizer, open_source(str(written)), 8, 16, 0).tolist() == found.tolist()
    ids = json_lines(tmp_path / "ids.jsonl", [{"input_ids": list(range(5, 37))}])
    assert source_rows(tokenizer, open_source(str(ids)), 2, 16, 0).flatten().tolist() == list(range(5, 37))


def test_a_tokenizer_that_only_ends_texts_begins_no_row(tmp_path: Path) -> None:
    tokenizer, path = tiny_tokenizer(), kinds(tmp_path)["text"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = tokenizer("\n".join(LINES)).input_ids
    found = source_rows(tokenizer, open_source(str(path)), 10_000, 16, 0)
    assert found.flatten().tolist() == tokens[: len(tokens) // 16 * 16]


def test_a_tokenizer_without_special_tokens_adds_none(tmp_path: Path) -> None:
    path = kinds(tmp_path)["text"]
    assert rows(path, sentences=True).tolist() == rows(path).tolist()


# What cannot be used.


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"content": "a", "id": 3}, "found the keys content, id, expected one of text, messages, input_ids"),
        ({}, "found no key"),
        (["text"], "found list, expected an object"),
        ({"text": 3}, "text is int, expected a string"),
        ({"text": "half \ud800"}, "half a surrogate pair"),
        ({"input_ids": [1, VOCAB_SIZE]}, "token 128 is outside the vocabulary, which is 0 to 127"),
        ({"input_ids": [-1]}, "token -1 is outside"),
        ({"input_ids": [1.5]}, "no list of integers"),
        ({"input_ids": [True]}, "no list of integers"),
        ({"input_ids": [4]}, "text and input_ids are mixed"),
        ({"messages": CHATS[0]}, "the tokenizer has no chat template"),
        ({"messages": "hello"}, "messages is no list of objects with role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages is no list of objects with role and content"),
        ({"messages": [{"role": "user"}]}, "messages is no list of objects with role and content"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, record: Any, said: str) -> None:
    message = refusal(json_lines(tmp_path / "a.jsonl", [{"text": "good"}, record]))
    assert message.startswith(f"{tmp_path}/a.jsonl, line 2: ") and said in message


def test_records_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    records = [{"text": line} for line in LINES]
    path = json_lines(tmp_path / "a.jsonl", [records[0], {"text": None}, *records[1:], {"text": None}])
    source = open_source(str(path))
    found = source_rows(tiny_tokenizer(), source, 10_000, 16, 0)
    assert found.tolist() == rows(kinds(tmp_path)["text"], 10_000).tolist()
    assert source.title == "a.jsonl (2 records without text left out)"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    expected = fingerprint(rows(kinds(tmp_path)["text"], 10_000))
    for name in ("lines.txt", "lines.jsonl", "lines.csv"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert fingerprint(rows(tmp_path / name, 10_000)) == expected
    marked = json_lines(tmp_path / "inside.jsonl", [{"text": "\ufeff" + "a" * 40}])
    assert rows(marked, 2).tolist() == rows(json_lines(tmp_path / "b.jsonl", [{"text": "a" * 40}]), 2).tolist()


def test_a_table_without_a_text_column(tmp_path: Path) -> None:
    message = refusal(text(tmp_path / "a.csv", "id,body\n1,words\n"))
    assert "a.csv has the columns id, body; expected one named text" in message
    assert "cannot be read as a table" in refusal(text(tmp_path / "b.csv", 'text\n"never closed'))


def test_a_broken_array_is_named(tmp_path: Path) -> None:
    assert "expected one object a line, or one array" in refusal(text(tmp_path / "a.json", '[{"text": "a"},\n'))
    assert "element 2: found int" in refusal(text(tmp_path / "b.json", '[{"text": "a"},\n 3]'))


def test_calls_of_tools_stand_in_place_of_content() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert document(Record("here", {"messages": [call]}), tokenizer) == "None[{'function': {'name': 'f'}}]"


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = refusal(json_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}]), tokenizer)
    assert "line 1: the chat template refuses these messages: roles must alternate" in message


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", '{"text": "good"}\n\n{"text": "bro\n')
    assert "a.jsonl, line 3: not valid JSON" in refusal(path)


def test_what_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe")
    assert "a.txt is not UTF-8 text (invalid start byte in line 1)" in refusal(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("good", encoding="utf-16")
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(b"good"))
    assert "(it begins as UTF-16)" in refusal(tmp_path / "b.txt")
    assert "(it is compressed by gzip)" in refusal(tmp_path / "c.jsonl")


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"body": "a", "id": 1}])
    assert "has the columns body, id; expected one of text, messages, input_ids" in refusal(path)


def test_a_parquet_record_is_named_by_its_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"input_ids": [1]}, {"input_ids": [VOCAB_SIZE]}])
    assert "a.parquet, row 2: " in refusal(path)


def test_what_is_no_parquet(tmp_path: Path) -> None:
    assert "cannot be read as parquet" in refusal(text(tmp_path / "a.parquet", "words"))


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    kinds(tmp_path)
    assert "split test) cannot be read by datasets" in refusal(f"{tmp_path}/set::test")
    assert "configuration x, split train) cannot be read by datasets" in refusal(f"{tmp_path}/set:x")
    assert "has no revisions" in refusal(f"{tmp_path}/set::train@main")
    (tmp_path / "empty").mkdir()
    assert "cannot be read by datasets" in refusal(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    text(tmp_path / "broken/train.jsonl", '{"text": "good"}\n{"text"\n')
    assert "cannot be read by datasets" in refusal(tmp_path / "broken")


@pytest.mark.parametrize("name", ["/none/a", "none.txt", "folder/none.jsonl", "none.parquet", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    assert f"source {name} was not found" in refusal(name)


@pytest.mark.parametrize("library", ["datasets", "pyarrow"])
def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    paths = kinds(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal(paths["parquet"] if library == "pyarrow" else paths["folder of parquet"])
    assert f"needs {library}, which is not installed; run: pip install datasets pyarrow" in message


# The hub.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("name", DatasetSpec("name")),
        ("owner/name", DatasetSpec("owner/name")),
        ("owner/name:cfg", DatasetSpec("owner/name", "cfg")),
        ("owner/name:cfg:test", DatasetSpec("owner/name", "cfg", "test")),
        ("owner/name::test", DatasetSpec("owner/name", None, "test")),
        ("owner/na.me-1:cfg@v1.0", DatasetSpec("owner/na.me-1", "cfg", "train", "v1.0")),
        ("owner/name@refs/pr/1", DatasetSpec("owner/name", None, "train", "refs/pr/1")),
    ],
)
def test_hub_names_are_taken_apart(given: str, expected: DatasetSpec) -> None:
    assert is_hub(given) and parse_dataset(given) == expected
    assert parse_dataset(str(expected)) == expected


@pytest.mark.parametrize("given", ["owner/name:a:b:c", "owner/name@", ":a"])
def test_what_is_no_hub_name(given: str) -> None:
    with pytest.raises(InputError, match=r"is no NAME\[:CONFIG\]\[:SPLIT\]\[@REVISION\]"):
        parse_dataset(given)


def test_a_hub_dataset_is_streamed_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorder(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((arguments, options))
        return [{"text": line} for line in LINES]

    monkeypatch.setattr(datasets, "load_dataset", recorder)
    source = open_source(f"owner/name:cfg:test@{COMMIT}")
    assert source.label == f"owner/name:cfg:test@{COMMIT}"
    assert "\n".join(record.value["text"] for record in source.records) == "\n".join(LINES)
    assert calls == [(("owner/name", "cfg"), {"split": "test", "revision": COMMIT, "streaming": True})]


@pytest.mark.parametrize(
    ("sources", "chosen", "offline"),
    [
        (["self", "a.txt"], None, "1"),
        (["a.txt", "owner/name"], None, "0"),
        (["owner/name"], "1", "1"),
        ([], "0", "0"),
    ],
)
def test_only_a_hub_dataset_goes_online(
    monkeypatch: pytest.MonkeyPatch, sources: list[str], chosen: str | None, offline: str
) -> None:
    # Set before it is deleted, so that what the code sets is undone too.
    monkeypatch.setenv("HF_HUB_OFFLINE", chosen or "")
    if chosen is None:
        monkeypatch.delenv("HF_HUB_OFFLINE")
    config = RunConfig(model="m", calibration=tuple(sources) or ("self",))
    decide_hub_access(config.data_sources)
    assert os.environ["HF_HUB_OFFLINE"] == offline


def test_reports_hold_no_folders(tmp_path: Path) -> None:
    assert public_name("owner/name::test") == "owner/name::test"
    assert public_name(f"{tmp_path}/a.jsonl") == "a.jsonl"
    given = [
        "quantize",
        "/x/model",
        "--calibration",
        "owner/n=2",
        "--calibration",
        "/x/a.txt=.5",
        "--eval-data=/x/b.txt",
    ]
    assert shortened(given) == [
        "quantize", "model", "--calibration", "owner/n=2", "--calibration", "a.txt=.5", "--eval-data=b.txt",
    ]  # fmt: skip
