"""Whether a result is that of a configuration: its settings and the content of what they name. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from hawqtool.checkpoint.companions import companion_files
from hawqtool.checkpoint.content import ContentRecord
from hawqtool.checkpoint.index import read_index, stored_places, weights_hash
from hawqtool.config import SETTINGS, RunConfig, names_affecting
from hawqtool.errors import InputError
from hawqtool.settings.metadata import Affects
from hawqtool.values import split_weight

_CONFIG = "config.json"

Progress = Callable[[int, int], None]

_known_weights: dict[tuple[object, ...], str] = {}
"""Hashes that were made, by the state of the files."""


def config_fingerprint(
    config: RunConfig, content: ContentRecord | None = None, progress: Progress = lambda _done, _total: None
) -> str:
    """SHA-256 of the settings, and of the files that they name by content, wherever these lie.

    Of a model every byte counts, small files included; of other folders that of all their files; of a hub id or of
    what is not there only its name.

    Args:
        config: The settings.
        content: That of the model, where it is known; otherwise the model is read.
        progress: Called while it is read with the number of tensors that are done and of all.
    """
    values = config.model_dump(mode="json", exclude={*names_affecting(Affects.PLACE)})
    if Path(config.model).is_dir():
        values["model"] = _model(content) if content is not None else model_hash(Path(config.model), progress)
    else:
        values["model"] = config.model
    for name in (name for name in values if SETTINGS[name].names is not None):
        if isinstance(values[name], list):
            values[name] = [[_content(source), weight] for source, weight in map(split_weight, values[name])]
        elif values[name] is not None:
            values[name] = _content(values[name])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _content(text: str) -> str:
    path = Path(text)
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listed = [(str(p.relative_to(path)), _file_hash(p)) for p in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return text


def small_file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of what lies beside the weights and makes the rows, or is copied to the output.

    Raises:
        InputError: If what names these files cannot be used.
        OSError: If one cannot be read.
    """
    return {name: _file_hash(folder / name) for name in (_CONFIG, *companion_files(folder))}


def model_hash(folder: Path, progress: Progress) -> str:
    """SHA-256 of a model's files; one that cannot be read has none that a run could have begun with."""
    content = ContentRecord()
    try:
        content.weights, content.files = _weights(read_index(folder).files, progress), small_file_hashes(folder)
    except (InputError, OSError) as error:
        return f"unreadable: {error}"
    return _model(content)


def _weights(files: Sequence[Path], progress: Progress) -> str:
    """The weights' hash; many jobs of a batch name one model, which is read once while sizes and times stay."""
    found = [(file, file.stat()) for file in files]
    state = tuple((file, status.st_ino, status.st_size, status.st_mtime_ns) for file, status in found)
    if state not in _known_weights:
        content = ContentRecord()
        content.read(stored_places(files), progress)
        _known_weights[state] = weights_hash(files, content)
    return _known_weights[state]


def _model(content: ContentRecord) -> str:
    return hashlib.sha256(json.dumps([content.weights, content.files], sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
