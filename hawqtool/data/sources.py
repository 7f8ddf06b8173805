"""Where text comes from: files, local dataset folders and datasets of the hub, read record by record."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.errors import InputError
from hawqtool.parsing import MAX_RECORD_BYTES, MAX_RECORD_VALUES, ParseError, parse_json, read_bounded, short

FIELDS = ("text", "messages", "input_ids")
"""What a record may hold; of several the first counts."""

DEFAULT_SPLIT = "train"
_JSON_SUFFIXES, _PARQUET_SUFFIXES = {".jsonl", ".ndjson", ".json"}, {".parquet"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = {".txt", ".md", ".text"}
_FILE_SUFFIXES = _JSON_SUFFIXES | _PARQUET_SUFFIXES | _TEXT_SUFFIXES | set(_SEPARATORS)
_LONGEST_FIELD = 1 << 30
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BATCH_RECORDS = 256
_OTHER_CONTENT = {
    b"\xff\xfe": "it begins as UTF-16",
    b"\xfe\xff": "it begins as UTF-16",
    b"\x1f\x8b": "it is compressed by gzip",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd",
    b"PK\x03\x04": "it is a zip archive or an office document",
    b"PAR1": "it is a parquet file, whose name must end in .parquet",
}
"""What files begin with that are given in place of text."""


@dataclass(frozen=True)
class DatasetSpec:
    """What ``NAME[:CONFIG][:SPLIT][@REVISION]`` names; an empty CONFIG (``NAME::SPLIT``) is the default one."""

    name: str
    config: str | None = None
    split: str = DEFAULT_SPLIT
    revision: str | None = None

    def __str__(self) -> str:
        config = f":{self.config or ''}:{self.split}" if self.config or self.split != DEFAULT_SPLIT else ""
        return self.name + config + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Record:
    """One record and where it stands, for messages: ``corpus.jsonl, line 3``."""

    place: str
    value: Any


@dataclass
class Source:
    """Records of a source, in its order.

    Args:
        label: What the report calls it: a path's last part, or a hub dataset with the commit that was read.
        records: Read lazily.
        left_out: Records without text among those that were read.
    """

    label: str
    records: Generator[Record, None, None]
    left_out: int = 0

    @property
    def title(self) -> str:
        """The label, with what was left out."""
        return f"{self.label} ({self.left_out} records without text left out)" if self.left_out else self.label


def parse_dataset(text: str) -> DatasetSpec:
    """Take ``NAME[:CONFIG][:SPLIT][@REVISION]`` apart.

    Raises:
        InputError: If it has more parts than that, or an empty name.
    """
    path, _, revision = text.partition("@")
    name, *parts = path.split(":")
    if not name or len(parts) > 2 or ("@" in text and not revision):
        raise InputError(f"source {text!r} is no NAME[:CONFIG][:SPLIT][@REVISION]")
    config, split = (*parts, "", "")[:2]
    return DatasetSpec(name, config or None, split or DEFAULT_SPLIT, revision or None)


def is_hub(text: str) -> bool:
    """Whether a source names a dataset of the hub, not something on this machine."""
    if os.path.exists(text) or Path(text).suffix.lower() in _FILE_SUFFIXES:
        return False
    name = text.partition("@")[0].partition(":")[0]
    return not os.path.exists(name) and _HUB_NAME.fullmatch(name) is not None


def public_name(text: str) -> str:
    """A source without the folders of its path; hub datasets stay as they are."""
    return text if is_hub(text) else Path(text).name or Path(text).resolve().name


def check_found(text: str) -> None:
    """Check that a source on this machine is there, without reading it.

    Raises:
        InputError: If it is not.
        OSError, ValueError: If no file system takes the path.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        os.stat(text)
    places = text, text.partition("@")[0].partition(":")[0]
    if not (os.path.isfile(text) or any(map(os.path.isdir, places)) or is_hub(text)):
        raise InputError(
            f"source {short(text)} was not found; give a text, .jsonl, .csv or .parquet file, a folder of such files, "
            "the name of a hub dataset, or (to calibrate) self"
        )


def is_plain_text(text: str) -> bool:
    """Whether a source is a file that is read as one text: no code, such as a chat template, has a part in that."""
    return os.path.isfile(text) and Path(text).suffix.lower() not in (*_JSON_SUFFIXES, *_PARQUET_SUFFIXES, *_SEPARATORS)


def open_source(text: str, decode: bool = True) -> Source:
    """Open a text, JSON, CSV or parquet file, a folder that ``datasets`` can load, or a dataset of the hub.

    Args:
        text: What the user gave.
        decode: Whether ``datasets`` decodes images and sounds; otherwise they come as the bytes of files.

    Raises:
        InputError: If there is no such source, it cannot be read, or the library for it is not installed. Reading
            the records raises it too, with the place of the record.
    """
    check_found(text)
    path = Path(text)
    if os.path.isfile(path):
        readers = dict.fromkeys(_JSON_SUFFIXES, _json) | dict.fromkeys(_PARQUET_SUFFIXES, _parquet)
        readers |= dict.fromkeys(_SEPARATORS, _table)
        return Source(path.name, readers.get(path.suffix.lower(), _text_lines)(path))
    if os.path.isdir(path):
        return _local_dataset(DatasetSpec(text), decode)
    if is_hub(text):
        return _hub_dataset(parse_dataset(text), decode)
    return _local_dataset(parse_dataset(text), decode)


def _text_lines(path: Path) -> Generator[Record, None, None]:
    """Lines of a text: joined by newlines they are the text again."""
    for number, line in _lines(path):
        yield Record(f"{path}, line {number}", {"text": line})


def _json(path: Path) -> Generator[Record, None, None]:
    """One value a line; a file that begins with a bracket is one array of them."""
    first = next((line.strip() for _, line in _lines(path) if line.strip()), "")
    return _json_array(path) if first.startswith("[") else _json_lines(path)


def _json_array(path: Path) -> Generator[Record, None, None]:
    try:
        text = read_bounded(path, MAX_RECORD_BYTES).decode("utf-8-sig")
        values = parse_json(text, MAX_RECORD_VALUES)
    except (ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected one object a line, or one array") from error
    for number, value in enumerate(values, 1):
        yield Record(f"{path}, element {number}", value)


def _table(path: Path) -> Generator[Record, None, None]:
    """Rows of a CSV or TSV file whose first line names the column ``text``."""
    csv.field_size_limit(_LONGEST_FIELD)  # the default, 131,072 characters, is less than a long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream, delimiter=_SEPARATORS[path.suffix.lower()], strict=True)
            if FIELDS[0] not in (table.fieldnames or ()):
                found = ", ".join(map(short, table.fieldnames or ())) or "none"
                raise InputError(f"{path} has the columns {short(found)}; expected one named {FIELDS[0]}")
            for value in table:
                yield Record(f"{path}, line {table.line_num}", {FIELDS[0]: value[FIELDS[0]] or None})
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); save it as UTF-8 CSV or JSON lines") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _json_lines(path: Path) -> Generator[Record, None, None]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ParseError as error:
            raise InputError(f"{place}: not valid JSON ({error}); expected one object a line") from error
        yield Record(place, value)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:  # a byte order mark is no text
            for line in stream:
                number += 1
                yield number, line.removesuffix("\n")
    except UnicodeDecodeError as error:
        found = _content(path) or f"{error.reason} in line {number + 1}"
        raise InputError(f"{path} is not UTF-8 text ({found}); convert it first") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _content(path: Path) -> str | None:
    """What a file that is no UTF-8 begins as; None for what is not known."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for magic, name in _OTHER_CONTENT.items() if start.startswith(magic)), None)


def _parquet(path: Path) -> Generator[Record, None, None]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing_extra(path, "pyarrow") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [name for name in FIELDS if name in file.schema_arrow.names]
            if not columns:
                found = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path} has the columns {found}; expected one of {', '.join(FIELDS)}")
            for batch in file.iter_batches(batch_size=_BATCH_RECORDS, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet after row {number}: {_first_line(error)}") from error


def _local_dataset(spec: DatasetSpec, decode: bool) -> Source:
    if spec.revision:
        raise InputError(f"{spec}: a local folder has no revisions; leave @{spec.revision} out")
    folder = Path(spec.name).resolve()
    return Source(str(DatasetSpec(folder.name, spec.config, spec.split)), _dataset_records(spec, str(folder), decode))


def _hub_dataset(spec: DatasetSpec, decode: bool) -> Source:
    """A dataset of the hub at the commit that its revision names now, so that the report says what was read."""
    _import_datasets(spec)
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    commit = spec.revision
    if commit is None or not _COMMIT.fullmatch(commit):
        try:
            commit = HfApi().dataset_info(spec.name, revision=spec.revision).sha
        except RevisionNotFoundError as error:
            raise InputError(f"dataset {spec.name} of the hub has no revision {spec.revision}") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{spec} is no file or folder here, and the hub has no such dataset, or only for those who are logged "
                "in (HF_TOKEN)"
            ) from error
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise InputError(
                f"{spec} is no file or folder here, and as a dataset of the hub it cannot be reached: "
                f"{_first_line(error)}"
            ) from error
    resolved = DatasetSpec(spec.name, spec.config, spec.split, commit)
    return Source(str(resolved), _dataset_records(resolved, resolved.name, decode))


def _dataset_records(spec: DatasetSpec, path: str, decode: bool) -> Generator[Record, None, None]:
    datasets = _import_datasets(spec)
    import httpx
    import pyarrow

    known = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, httpx.HTTPError)
    number = 0
    try:
        found = datasets.load_dataset(path, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        for value in found if decode else found.decode(False):
            number += 1
            yield Record(f"{spec}, record {number}", value)
    # A dataset made of a script is a RuntimeError, a codec that is not installed an ImportError.
    except (OSError, ValueError, RuntimeError, ImportError, *known) as error:
        raise InputError(
            f"{spec} (configuration {spec.config or 'default'}, split {spec.split}) cannot be read by datasets after "
            f"{number} records: {_first_line(error)}"
        ) from error


def _import_datasets(spec: DatasetSpec) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing_extra(spec, "datasets") from error
    return datasets


def _missing_extra(source: object, library: str) -> InputError:
    return InputError(f"{source} needs {library}, which is not installed; run: pip install datasets pyarrow")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
