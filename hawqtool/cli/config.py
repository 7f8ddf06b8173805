"""``hawqtool config``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hawqtool.cli import options as o
from hawqtool.cli.session import print_json, session
from hawqtool.config import DEFAULT, FILE, PRESET, SETTINGS, RunConfig, load_config, merge_sources, preset_and_file
from hawqtool.report.escape import one_line
from hawqtool.settings.metadata import RUN, help_of

CONFIG_SCHEMA = "hawqtool.config/1"
MISSING = "missing"


@o.with_settings
def config(
    values: o.Values,
    preset: o.Preset = None,
    config: o.Config = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="A JSON schema of the YAML file, for editors.", rich_help_panel=RUN)
    ] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print the settings that quantize would take, as YAML, each with its origin: default, preset, file or flag.

    null means that the run decides, by the device or the target, as the help of the flag says.

    Example: hawqtool config --preset balanced --seed 1

    Example: hawqtool config --preset balanced > run.yaml

    Example: hawqtool config --schema > hawqtool.schema.json
    """
    with session(debug=debug, json=json):
        if schema:
            print_json(config_schema())
            return
        document = resolved(config, values, preset)
        if json:
            print_json(document)
        else:
            print(_as_yaml(document))


def resolved(path: Path | None, flags: Mapping[str, Any], preset: str | None = None) -> dict[str, Any]:
    """Every key with its value and origin; a recipe needs no model here.

    Raises:
        UsageError: If preset, file or flags are wrong.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    found, origin = merge_sources(path, given, preset)
    presets, file = preset_and_file(path, preset)
    missing = {} if "model" in found else {"model": MISSING}
    values = load_config(path, given | missing, preset).model_dump(mode="json") | dict.fromkeys(missing)
    return {
        "schema": CONFIG_SCHEMA,
        "presets": list(presets),
        "file": None if file is None else str(file),
        "config": values,
        "origin": dict.fromkeys(values, DEFAULT) | origin | missing,
    }


def _as_yaml(document: Mapping[str, Any]) -> str:
    """A file for ``-c`` that gives the same configuration; origins are comments."""
    origin = {
        PRESET: f"preset {' and '.join(document['presets'])}",
        FILE: f"file {one_line(document['file'])}",
        MISSING: "not given; quantize needs it",
    }
    lines = {key: _line(key, value) for key, value in document["config"].items()}
    # What is missing must not be taken for a value.
    lines |= {key: f"# {key}:" for key, source in document["origin"].items() if source == MISSING}
    width = min(max(map(len, lines.values())), 40)
    return "\n".join(
        f"{line:{width}}  # {origin.get(document['origin'][key], document['origin'][key])}"
        for key, line in lines.items()
    )


def _line(key: str, value: object) -> str:
    """``key: value`` in one line."""
    # Only double quotes keep a line break of a text in one line.
    broken = any("\n" in item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
    text: str = yaml.safe_dump(
        [value], default_flow_style=True, default_style='"' * broken or None, width=float("inf"), allow_unicode=True
    )
    return f"{key}: {text.strip()[1:-1]}"


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file; what a key means is the help of its flag, and the details."""
    document = RunConfig.model_json_schema()
    # Any key may be given as a flag instead.
    document.pop("required")
    for key, entry in document["properties"].items():
        entry.pop("title")
        field, setting = RunConfig.model_fields[key], SETTINGS[key]
        entry["description"] = f"{help_of(field, setting)} {setting.detail}".strip()
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hawqtool run"}
    # The docstring of the class is for readers of the code.
    return about | {key: value for key, value in document.items() if key not in ("title", "description")}
