"""Presets: configuration files that come with the program, each with a header that says what it is for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from hawqtool.errors import UsageError

FOLDER = Path(__file__).parent
_HEADER = ("about", "costs", "loads in")


@dataclass(frozen=True)
class Preset:
    """A preset and its header.

    Args:
        name: Name of the file without ``.yaml``.
        about: What it is for, in one sentence.
        costs: Time and memory, and for what.
        loads_in: Engines that load what it gives.
        path: The file.
    """

    name: str
    about: str
    costs: str
    loads_in: str
    path: Path


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return [read_preset(FOLDER / f"{name}.yaml") for name in preset_names()]


def find_preset(name: str) -> Path:
    """The file of a preset.

    Raises:
        UsageError: If there is none of that name; names those that there are.
    """
    names = preset_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ","
    raise UsageError(
        f"unknown preset {name!r}{hint} there are {', '.join(names)} (a file is given as ./NAME or NAME.yaml)"
    )


def read_preset(path: Path) -> Preset:
    """The header of a preset: the first three lines, ``# about:``, ``# costs:`` and ``# loads in:``.

    Raises:
        ValueError: If one is missing, or stands in another place.
    """
    lines = path.read_text(encoding="utf-8").splitlines()[: len(_HEADER)]
    found: dict[str, str] = {}
    for key, line in zip(_HEADER, [*lines, "", "", ""], strict=False):
        text = line.removeprefix(f"# {key}: ").strip()
        if not text or text == line.strip():
            raise ValueError(f"{path}: found {line!r}, expected a line that begins with '# {key}: '")
        found[key] = text
    return Preset(path.stem, found["about"], found["costs"], found["loads in"], path)
