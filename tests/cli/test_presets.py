"""``hawqtool presets`` and ``--preset``: what ships with the program and how it is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.config import load_config
from hawqtool.errors import UsageError
from hawqtool.export.engines import engines
from hawqtool.formats import QuantFormat
from hawqtool.parsing import read_yaml
from hawqtool.presets import find_preset, list_presets, preset_names, read_preset

NAMES = ["balanced", "best", "ci-gate", "fast", "portable-4bit"]


def test_each_is_listed_with_its_costs_and_engines() -> None:
    result = CliRunner().invoke(app, ["presets"])
    document = json.loads(CliRunner().invoke(app, ["presets", "--json"]).stdout)
    assert document["schema"] == "hawqtool.presets/1"
    assert [entry["name"] for entry in document["presets"]] == preset_names() == NAMES
    printed = " ".join(result.stdout.split())
    for entry in document["presets"]:
        assert all(entry[key] in printed for key in ("name", "about", "costs", "loads_in"))
        assert entry["settings"] == read_yaml(find_preset(entry["name"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_run_with_one_target(name: str) -> None:
    load_config(None, {"model": "m", "output": "o"}, name).require_one_target()


@pytest.mark.parametrize("preset", list_presets(), ids=lambda preset: preset.name)
def test_the_engines_of_a_preset_are_those_that_load_its_formats(preset: object) -> None:
    settings = read_yaml(preset.path)  # type: ignore[attr-defined]
    formats = {f"layers.{bits}.up_proj": QuantFormat(bits, settings.get("group_size", 64)) for bits in settings["bits"]}
    found = engines(formats, dict.fromkeys(formats, (512, 512)))
    loading = [entry["engine"] for entry in found if entry["loads"]]
    assert preset.loads_in.split(", ") == loading  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--preset", "fats"], ["-c", "fats"]])
def test_an_unknown_preset_names_the_nearest_and_all(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["quantize", "m", "-o", "o", *arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "unknown preset 'fats', did you mean 'fast'?" in result.stderr
    assert all(name in result.stderr for name in NAMES)


def test_nothing_near_is_no_guess() -> None:
    with pytest.raises(UsageError, match="unknown preset 'xyz', there are balanced"):
        find_preset("xyz")
    with pytest.raises(UsageError, match="unknown preset"):
        find_preset("../presets/fast")


@pytest.mark.parametrize(
    "text",
    ["", "seed: 1\n", "# about: a\n# costs: b\n", "# costs: b\n# about: a\n# loads in: c\n", "# about:\n# costs: b\n"],
)
def test_a_header_is_strict(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match="expected a line that begins with"):
        read_preset(tmp_path / "p.yaml")
