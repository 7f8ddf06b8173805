"""``hawqtool presets``."""

from __future__ import annotations

import textwrap
from typing import Any

from hawqtool.cli import options as o
from hawqtool.cli.session import print_json, session
from hawqtool.parsing import read_yaml
from hawqtool.presets import Preset, list_presets

PRESETS_SCHEMA = "hawqtool.presets/1"
_WIDTH, _INDENT = 100, 15


def presets(json: o.Json = False, debug: o.Debug = False) -> None:
    """List the presets: what each is for, what it costs, what its result loads in, and its settings.

    Example: hawqtool presets

    Example: hawqtool quantize ./model -o ./out --preset fast
    """
    with session(debug=debug, json=json):
        found = list_presets()
        if json:
            print_json({"schema": PRESETS_SCHEMA, "presets": [_document(preset) for preset in found]})
        else:
            print("\n\n".join(map(_text, found)))


def _document(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "about": preset.about,
        "costs": preset.costs,
        "loads_in": preset.loads_in,
        "settings": read_yaml(preset.path),
    }


def _text(preset: Preset) -> str:
    settings = ", ".join(f"{key} {_value(value)}" for key, value in read_yaml(preset.path).items())
    parts = {preset.name: preset.about, "  costs": preset.costs, "  loads in": preset.loads_in, "  settings": settings}
    return "\n".join(_paragraph(label, text) for label, text in parts.items())


def _value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _paragraph(label: str, text: str) -> str:
    """A label and its text beside it, in lines of one width."""
    return textwrap.fill(text, _WIDTH, initial_indent=f"{label:{_INDENT}}", subsequent_indent=" " * _INDENT)
