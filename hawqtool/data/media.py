"""Images and sounds with the texts that belong to them, from folders of files and from datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.data.sources import Source, is_hub, open_source
from hawqtool.errors import InputError

TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "caption")
"""Columns of a dataset that may hold the text of a record; of several the first counts."""

_SHUFFLED_RECORDS = 10_000
"""Records of a dataset that are read for a seed to draw from, at most."""


@dataclass(frozen=True)
class MediaKind:
    """What files hold.

    Args:
        name: As messages call one.
        column: Column of datasets that holds it.
        suffixes: Of its files.
    """

    name: str
    column: str
    suffixes: tuple[str, ...]


@dataclass(frozen=True)
class MediaRecord:
    """One image or sound.

    Args:
        place: Where it comes from, for messages.
        content: Its file, or the bytes of one.
        text: What is said in it or about it; None where nothing is given.
    """

    place: str
    content: Path | bytes
    text: str | None


@dataclass(frozen=True)
class Media:
    """What a source gave.

    Args:
        label: What the report calls it.
        values: Images or sounds as the model takes them, ``[rows, ...]`` float32.
        places: Where each comes from, for messages.
        texts: The text of each; None where it has none.
    """

    label: str
    values: Tensor
    places: tuple[str, ...]
    texts: tuple[str | None, ...]


def read_media(kind: MediaKind, text: str, count: int, seed: int, value: Callable[[MediaRecord], Tensor]) -> Media:
    """Read a folder of files, each perhaps with its text in a file of the same name that ends in .txt, or a dataset.

    Args:
        kind: What is looked for.
        text: A folder, or a dataset as `open_source` takes it.
        count: Records that are needed; no more are opened, and there may be fewer.
        seed: With 0 in the order of the source (files by path); any other seed shuffles.
        value: Makes of a record what the model takes.

    Raises:
        InputError: If the folder is missing or holds no such file, the dataset cannot be read, a record cannot be used,
            or values have several shapes.
    """
    label, records = _opened(kind, text, count, seed)
    places, texts, values = [], [], list[Tensor]()
    for record in islice(records, count):
        places.append(record.place)
        texts.append(record.text)
        values.append(value(record))
        if values[-1].shape != values[0].shape:
            raise InputError(
                f"the {kind.name} processor makes {_size(values[0])} of {places[0]} but {_size(values[-1])} of "
                f"{record.place}; expected one size; give {kind.name}s of one shape, or set size in "
                "preprocessor_config.json to a height and a width"
            )
    if not values:
        raise InputError(f"{text} holds no {kind.name}")
    return Media(label, torch.stack(values), tuple(places), tuple(texts))


def _size(row: Tensor) -> str:
    return " x ".join(map(str, row.shape))


def _opened(kind: MediaKind, text: str, count: int, seed: int) -> tuple[str, Iterator[MediaRecord]]:
    """Label and records of a source, in the order in which they are taken."""
    folder = Path(text)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kind.suffixes)
        if files or not _is_dataset(folder):
            _require(files, folder, kind)
            return folder.name, (_of_file(path) for path in _shuffled(files, seed))
        return _dataset(kind, open_source(text, decode=False), count, seed)
    if is_hub(text):
        return _dataset(kind, open_source(text, decode=False), count, seed)
    raise InputError(f"{folder} is not a folder; this model takes {kind.name}s: give a folder of {kind.name} files")


def _is_dataset(folder: Path) -> bool:
    return any(path.suffix == ".parquet" for path in folder.rglob("*"))


def _require(files: Sequence[Path], folder: Path, kind: MediaKind) -> None:
    if not files:
        raise InputError(
            f"{folder} holds no {kind.name} ({', '.join(kind.suffixes)}); give a folder of {kind.name} files"
        )


def _shuffled(found: list[Any], seed: int) -> list[Any]:
    if not seed:
        return found
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[index] for index in order]


def _of_file(path: Path) -> MediaRecord:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return MediaRecord(str(path), path, None)
    try:
        return MediaRecord(str(path), path, beside.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{beside} cannot be read as UTF-8 text ({error})") from error


def _dataset(kind: MediaKind, source: Source, count: int, seed: int) -> tuple[str, Iterator[MediaRecord]]:
    taken = islice(source.records, max(count, _SHUFFLED_RECORDS) if seed else count)
    found = (_of_record(kind, record.place, record.value) for record in taken)
    return source.label, iter(_shuffled(list(found), seed)) if seed else found


def _of_record(kind: MediaKind, place: str, value: Any) -> MediaRecord:
    given = value.get(kind.column)
    content = given.get("bytes") if isinstance(given, dict) else None
    if not isinstance(content, bytes):
        raise InputError(
            f"{place}: found the columns {', '.join(map(str, value))}; expected {kind.column} with the bytes of a file"
        )
    text = next((value[name] for name in TEXT_COLUMNS if isinstance(value.get(name), str)), None)
    return MediaRecord(place, content, text)
