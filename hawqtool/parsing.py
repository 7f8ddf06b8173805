"""JSON and YAML of unknown origin: bounded in size, depth and number of values, each key once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from hawqtool.errors import UsageError

MAX_JSON_BYTES = 100_000_000
"""Most bytes of a JSON file of a checkpoint; the safetensors library allows its headers as many."""
MAX_RECORD_BYTES = 1 << 30
"""Most bytes of a file that passes between the stages: sensitivity.json of thousands of units is large."""
MAX_YAML_BYTES = 256_000
"""Most bytes of a YAML file; the parser takes seconds for as many."""
MAX_DEPTH = 64
"""Most containers inside each other; writing and comparing them recurses."""
MAX_VALUES = 10_000_000
"""Most values of a document of a checkpoint: small ones such as ``[]`` take up to 40 times their text in memory."""
MAX_RECORD_VALUES = 100_000_000

_LONGEST = 120
MAX_LINE = 2000
"""Most characters of a line on a terminal or in a log, whatever of a file is quoted in it."""


class ParseError(ValueError):
    """A text that is not used, with the reason in one line."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Content of a file.

    Raises:
        ParseError: If it cannot be read or is larger than ``max_bytes``.
    """
    try:
        if not path.is_file() and path.exists() and not path.is_dir():
            raise ParseError("it is a pipe or a device, a file was expected")  # opening it might wait forever
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # Not the limit: read allocates what it is asked for.
            content = stream.read(min(size, max_bytes) + 1)
    except ParseError:
        raise
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise ParseError(getattr(error, "strerror", None) or str(error)) from None
    if len(content) > max_bytes:
        raise ParseError(f"it has more than the {max_bytes:,} bytes that are allowed")
    return content


def load_json(path: Path, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_VALUES) -> Any:
    """Value of a JSON file.

    Raises:
        ParseError: As `read_bounded` and `parse_json`.
    """
    return parse_json(read_bounded(path, max_bytes), max_values)


def parse_json(content: bytes | str, max_values: int = MAX_VALUES) -> Any:
    """Value of a JSON text. NaN and Infinity, which Python writes, are taken.

    Raises:
        ParseError: If it is no JSON, not UTF-8, holds half a surrogate pair, has more than ``max_values`` values or
            more than `MAX_DEPTH` containers inside each other, or an object has a key twice.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        # Every value but the first follows one of these, so this bounds the memory before it is taken.
        if sum(map(text.count, "[{,")) > max_values:
            raise ParseError(f"it has more than the {max_values:,} values that are allowed")
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ParseError(_TOO_DEEP) from None
    except ParseError:
        raise
    except ValueError as error:  # also: text that is not UTF-8, integers of thousands of digits
        raise ParseError(short(str(error))) from None
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        _check_text(value)
    return value


def parse_yaml(content: bytes) -> Any:
    """Value of a YAML text of plain values: no aliases, which multiply without bound, and no tags.

    Raises:
        ParseError: If it is no such YAML, not UTF-8, larger than `MAX_YAML_BYTES`, nested deeper than `MAX_DEPTH`, or
            a mapping has a key twice.
    """
    if len(content) > MAX_YAML_BYTES:
        raise ParseError(f"it has more than the {MAX_YAML_BYTES:,} bytes that are allowed")
    try:
        value = yaml.load(content.decode("utf-8-sig"), Loader=_PlainLoader)  # a SafeLoader that takes less
    except RecursionError:
        raise ParseError(_TOO_DEEP) from None
    except ParseError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ParseError(short(f"{', '.join(filter(None, (error.context, error.problem)))}{place}")) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # numbers and dates that cannot be
        raise ParseError(short(" ".join(str(error).split()))) from None
    _check_depth(value)
    _check_text(value)
    return value


def short(text: str, longest: int = _LONGEST) -> str:
    """A text cut with an ellipsis beyond ``longest`` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def shown(value: object) -> str:
    """A value for a message: its representation, cut; never fails, whatever a file holds."""
    try:
        return short(repr(value))
    except ValueError:  # an integer with more digits than Python prints
        return f"{type(value).__name__} of thousands of digits"


def printable(text: str) -> str:
    r"""A text for one line of a terminal: what is not printable, such as escapes, is written as ``\x1b``.

    Control characters move the cursor and colour, bidirectional ones reorder what is read.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def terminal_line(text: str) -> str:
    """A text of any origin for one line: `printable`, and cut beyond `MAX_LINE`."""
    return short(printable(short(text, MAX_LINE)), MAX_LINE)


_TOO_DEEP = f"it has more than the {MAX_DEPTH} containers inside each other that are allowed"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys must differ: a repeated one would silently hide a value."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ParseError(f"it names {printable(short(name))} twice")
            seen.add(name)
    return result


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for container in level
            if isinstance(container, (dict, list))
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ParseError(_TOO_DEEP)


def _check_text(value: Any) -> None:
    """Refuse half surrogate pairs, which escapes can spell but no file can hold; depth was checked."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ParseError(f"it holds {shown(value)} with half a surrogate pair") from None
    elif isinstance(value, dict):
        for key, child in value.items():
            _check_text(key)
            _check_text(child)
    elif isinstance(value, list):
        for child in value:
            _check_text(child)


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases and tags, each key once."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ParseError(f"line {line} uses an alias (*), which is not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ParseError(f"line {line} uses a tag (!), which is not allowed; write a plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise ParseError(f"line {key.start_mark.line + 1} names {printable(short(key.value))} twice")
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Values by key of a configuration file, as they stand there; dashes in keys become underscores.

    Raises:
        UsageError: If it is missing, no YAML, or holds something else than keys.
    """
    if not os.path.isfile(path):
        raise UsageError(f"configuration file {path} was not found; check the path")
    try:
        loaded = parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except ParseError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds {type(loaded).__name__}, expected keys such as model, output and target_bpw")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
