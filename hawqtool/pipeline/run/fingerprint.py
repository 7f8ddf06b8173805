"""Whether a result is that of a configuration: its settings and the content of what they name. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from hawqtool.config import SETTINGS, RunConfig, names_affecting
from hawqtool.settings import Affects
from hawqtool.values import split_weight

_SAMPLED_PIECES, _PIECE_BYTES = 64, 4096


def config_fingerprint(config: RunConfig) -> str:
    """SHA-256 of the settings, and of the files that they name by content, wherever these lie.

    Of weights, 64 pieces of each file count; of other folders the names and sizes of their files; of a hub id or of
    what is not there only its name.
    """
    values = config.model_dump(mode="json", exclude={*names_affecting(Affects.PLACE)})
    values["model"] = _model(Path(config.model)) if Path(config.model).is_dir() else config.model
    for name in (name for name in values if SETTINGS[name].names is not None):
        if isinstance(values[name], list):
            values[name] = [[_content(source), weight] for source, weight in map(split_weight, values[name])]
        elif values[name] is not None:
            values[name] = _content(values[name])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _content(text: str) -> str:
    path = Path(text)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listed = [(str(p.relative_to(path)), p.stat().st_size) for p in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return text


def _model(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    """Evenly spaced pieces of a file, its ends among them."""
    last = max(file.stat().st_size - _PIECE_BYTES, 0)
    with file.open("rb") as stream:
        for number in range(_SAMPLED_PIECES):
            stream.seek(number * last // (_SAMPLED_PIECES - 1))
            yield stream.read(_PIECE_BYTES)
