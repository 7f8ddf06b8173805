"""``hawqtool config``: values with their origins, and a schema that says what files may hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [ROOT / "configs/default.yaml", *sorted((ROOT / "hawqtool/presets").glob("*.yaml"))]
EVERYTHING = """\
model: org/name@main
max-ppl-increase: 5%
group_size: channel
pin: "a\\nb=4"
bits: 3,4
foem_beta: 1.0e-07
calibration: [self, 'ü "text".txt=2']
eval_data: null
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["config", *map(str, arguments)])


def schema() -> dict[str, Any]:
    document = json.loads(invoke("--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(document)
    assert isinstance(document, dict)
    return document


def test_every_value_has_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EVERYTHING)
    document = json.loads(invoke("-c", path, "--seed", "0", "--bits", "8", "--json").stdout)
    origin = document["origin"]
    assert set(origin) == set(document["config"]) == set(RunConfig.model_fields)
    # A flag that repeats the default, or wins over the file, is a flag; a null in the file is of the file.
    assert {key for key, source in origin.items() if source == "flag"} == {"seed", "bits"}
    in_file = {"model", "max_ppl_increase", "group_size", "pin", "foem_beta", "calibration", "eval_data"}
    assert {key for key, source in origin.items() if source == "file"} == in_file
    assert document["config"]["bits"] == [8] and document["config"]["max_ppl_increase"] == 0.05
    printed = invoke("-c", path, "--seed", "0", "--bits", "8").stdout
    assert f"# file {path}" in printed
    comments = {line.partition(":")[0]: line.rpartition("# ")[2].split()[0] for line in printed.splitlines()}
    assert comments == origin


def test_a_preset_is_an_origin_of_its_own() -> None:
    document = json.loads(invoke("--preset", "fast", "--target-kl", "0.1", "--json").stdout)
    assert document["presets"] == ["fast"] and document["file"] is None
    assert document["origin"]["rounding"] == "preset" and document["origin"]["target_bpw"] == "default"
    assert document["config"]["target_bpw"] is None and document["config"]["rounding"] == "rtn"
    assert "# preset fast" in invoke("-c", "fast").stdout


def test_what_is_printed_is_a_file_of_the_same_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EVERYTHING)
    (tmp_path / "again.yaml").write_text(invoke("-c", path).stdout)
    assert load_config(tmp_path / "again.yaml", {}) == load_config(path, {})


def test_a_recipe_needs_no_model_to_be_looked_at(tmp_path: Path) -> None:
    result = invoke("--target-bpw", "4")
    assert result.exit_code == 0 and "model" not in yaml.safe_load(result.stdout)
    assert "# model:" in result.stdout
    assert json.loads(invoke("--json").stdout)["config"]["model"] is None


def test_wrong_settings_exit_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("target_bwp: 3\n")
    result = invoke("-c", tmp_path / "run.yaml", "--seed", "-1")
    assert result.exit_code == 2 and result.stdout == ""
    assert "did you mean 'target_bpw'" in result.stderr and "seed" in result.stderr


def test_the_schema_explains_every_key() -> None:
    properties = schema()["properties"]
    assert set(properties) == set(RunConfig.model_fields)
    for key, entry in properties.items():
        assert entry["description"].endswith("."), key
        assert "\\[" not in entry["description"]
    assert "[default: all that engines load" in properties["group_size"]["description"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_our_files(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), schema())


@pytest.mark.parametrize(
    "values",
    [
        {"bits": "2,3,4"},
        {"bits": [4]},
        {"bits": 4},
        {"group_size": "channel"},
        {"pin": "a=4"},
        {"max_regression": "5%", "baseline": "report.json"},
        {"max_ppl_increase": 0.05},
        {"extra_metrics": "hawq,kl"},
        {"target_size": None},
    ],
    ids=str,
)
def test_the_schema_accepts_what_the_program_does(values: dict[str, Any]) -> None:
    load_config(None, {"model": "m", **values})
    jsonschema.validate(values, schema())


@pytest.mark.parametrize(
    "values",
    [
        {"target_bwp": 3.5},
        {"target_bpw": 0},
        {"group_size": 40},
        {"profile": "everything"},
        {"seed": -1},
        {"max_kl": "low"},
        {"pin": [4]},
        {"symmetric": "perhaps"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_program_does(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RunConfig(**{"model": "m", **values})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema())


@pytest.mark.parametrize("arguments", [["--schema"], ["m", "--target-bpw", "4"]])
def test_it_loads_no_heavy_library(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom hawqtool.cli.app import app\n"
        f"try:\n    app(['config', *{arguments!r}])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900, check=False)
    assert done.stderr.strip().endswith("[]"), done.stderr
