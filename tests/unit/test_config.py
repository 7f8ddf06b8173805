"""Settings from one source: configs/default.yaml, presets, flags and pages say the same; errors say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.config import SETTINGS, RunConfig, load_config, names_affecting
from hawqtool.errors import UsageError
from hawqtool.settings.metadata import Affects, flag_of, setting_of
from hawqtool.settings.targets import NEED_EVALUATION

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "configs/default.yaml"
NOT_CONFIG = {"help_all", "verbose", "preset", "config", "dry_run", "junit", "schema", "json", "quiet", "debug", "help"}
"""Parameters of the command that choose how to run and print, not what to do."""


def read(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def flags_of(command: str) -> dict[str, list[str]]:
    """Name of each parameter of a command to the spellings of its flag; of an argument to its bare name."""
    program: Any = typer.main.get_command(app)
    return {parameter.name: parameter.opts for parameter in program.commands[command].params}


def test_default_yaml_has_every_key_with_its_default() -> None:
    values = read(DEFAULT)
    assert set(values) == set(RunConfig.model_fields)
    loaded = load_config(DEFAULT, {})
    for name, field in RunConfig.model_fields.items():
        if SETTINGS[name].example is None:
            assert getattr(loaded, name) == field.default, name


def test_default_yaml_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import default_config

    assert DEFAULT.read_text(encoding="utf-8") == default_config.text(), "run python scripts/default_config.py"


def test_default_yaml_can_be_run() -> None:
    load_config(DEFAULT, {}).require_one_target()


def test_every_setting_says_what_it_is() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, setting in SETTINGS.items():
        assert setting.help.endswith(".") and setting.detail.endswith((".", "")), name
        assert set(setting.commands) <= commands - {"quantize", "config"}, name
    with pytest.raises(TypeError, match="found 0"):
        setting_of(RunConfig.model_fields["model"].__class__(annotation=int))


def test_every_effect_is_that_of_some_setting_and_each_setting_has_one() -> None:
    assert sorted(name for kind in Affects for name in names_affecting(kind)) == sorted(RunConfig.model_fields)
    assert all(names_affecting(kind) for kind in Affects)


def test_a_setting_is_written_in_one_place() -> None:
    # Beside the fields only code that uses a setting names it: no second list of options, pages or fingerprints.
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "hawqtool").rglob("*.py"))
        if re.search(r"gptaq[_-]alpha|GptaqAlpha", path.read_text(encoding="utf-8"))
    ]
    assert found == ["hawqtool/pipeline/run/resolved.py", "hawqtool/settings/fields.py"]


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_help_pages_show_every_text_whole(command: str) -> None:
    # Square brackets are markup there: [@revision] and [default: 128] were swallowed once.
    program: Any = typer.main.get_command(app)
    flag = "--help-all" if "help_all" in {parameter.name for parameter in program.commands[command].params} else "-h"
    result = CliRunner().invoke(app, [command, flag], env={"COLUMNS": "400"})
    shown = " ".join(result.stdout.split())
    for parameter in program.commands[command].params:
        wanted = " ".join(parameter.help.replace("\\[", "[").split())
        assert wanted in shown, parameter.name
        assert not parameter.metavar or parameter.metavar in shown, parameter.name
    if command == "quantize":
        assert all(setting.help.removesuffix(".") in shown for setting in SETTINGS.values())


@pytest.mark.parametrize("command", ["quantize", "config"])
def test_every_key_is_a_flag_of_the_same_name(command: str) -> None:
    flags = flags_of(command)
    assert set(RunConfig.model_fields) == set(flags) - NOT_CONFIG
    for name in set(RunConfig.model_fields) - {"model"}:
        assert f"--{name.replace('_', '-')}" in flags[name], name


@pytest.mark.parametrize("command", ["quantize", "measure", "config"])
def test_no_flag_has_a_default_of_its_own(command: str) -> None:
    # A default of the flag would win over the YAML file.
    program: Any = typer.main.get_command(app)
    defaults = {p.name: p.default for p in program.commands[command].params if p.name in RunConfig.model_fields}
    assert {name for name, default in defaults.items() if default is not None} <= {"output"} - {"quantize"}


@pytest.mark.parametrize(
    ("command", "given", "missing"),
    [
        ("measure", "group_size", "target_bpw"),
        ("allocate", "solver", "rounding"),
        ("evaluate", "eval_data", "calibration"),
        ("inspect", "calibration", "eval_data"),
    ],
)
def test_commands_take_the_settings_that_concern_them(command: str, given: str, missing: str) -> None:
    flags = flags_of(command)
    assert flag_of(given) in flags[given] and missing not in flags


def test_defaults_stand_in_the_help_in_words() -> None:
    program: Any = typer.main.get_command(app)
    said = {p.name: p.help.replace("\\[", "[") for p in program.commands["quantize"].params}
    assert said["num_samples"] == "Calibration rows [default: 128, on a CPU 16]."
    assert said["calibration"].endswith("[default: self].") and said["rounding"].endswith("[default: gptq].")
    assert "default" not in said["overwrite"] + said["target_bpw"] + said["model"]


def test_a_preset_is_below_the_file_and_flags_and_its_target_gives_way(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nnum_samples: 4\n")
    config = load_config(path, {"seed": 7}, "fast")
    assert (config.rounding, config.num_samples, config.seed, config.target_bpw) == ("rtn", 4, 7, 4.5)
    assert load_config(path, {"target_kl": 0.1}, "fast").target_bpw is None
    path = write(tmp_path, "model: m\ntarget_size: 1GB\n")
    load_config(path, {}, "fast").require_one_target()
    # Two targets of a file and a flag are still a mistake, which is said where one target is needed.
    with pytest.raises(UsageError, match="found --target-bpw and --target-size"):
        load_config(path, {"target_bpw": 4.0}, "fast").require_one_target()


def test_a_bare_name_is_that_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_text("rounding: foem\n")
    (tmp_path / "fast.yaml").write_text("rounding: gptaq\n")
    found = {name: load_config(Path(name), {"model": "m"}).rounding for name in ("fast", "fast.yaml")}
    assert found["fast"] == "rtn" and found["fast.yaml"] == "gptaq"
    assert load_config(tmp_path / "fast", {"model": "m"}).rounding == "foem"
    # Both at once: the name of -c wins over --preset, and its target gives way like that of --preset.
    config = load_config(Path("balanced"), {"model": "m", "target_size": "1GB"}, "best")
    assert (config.num_samples, config.distill_steps, config.target_bpw) == (32, 256, None)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nseed: 5\nnum-samples: 4\nrounding: rtn\n")
    config = load_config(path, {"seed": 7, "rounding": None, "pin": None})
    assert (config.seed, config.num_samples, config.rounding, config.foem_beta) == (7, 4, "rtn", 0.1)


def test_a_flag_of_zero_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "model: m\nseed: 5\n"), {"seed": 0}).seed == 0


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key 'target_bwp'.*did you mean 'target_bpw'\?"):
        load_config(write(tmp_path, "model: m\ntarget_bwp: 3.5\n"), {})


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nrounding: awq\nseed: -1\ngruop_size: 64\n")
    with pytest.raises(UsageError) as caught:
        load_config(path, {})
    for part in ("rounding", "'awq'", "seed", "-1", "gruop_size", "group_size", "run.yaml"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", "1,4", "widths from 2 to 8"),
        ("bits", "4;8", "widths from 2 to 8"),
        ("group_size", "40", "another multiple of 16"),
        ("target_size", "big", "3.2GiB"),
        ("target_bpw", "-1", "greater than 0"),
        ("profile", "everything", "portable"),
        ("eval_samples", "1", "greater than or equal to 2"),
        ("max_kl", "0", "greater than 0"),
        ("max_ppl_increase", "5", "a percentage such as 5%"),
        ("min_same_top", "101%", "less than or equal to 1"),
        ("max_size", "90 apples", "3.2GiB"),
        ("max_regression", "-5%", "a percentage such as 5%"),
        ("max_regression", "5%", "baseline and max_regression are needed together"),
    ],
)
def test_wrong_values_say_what_is_expected(key: str, value: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, {"model": "m", key: value})
    assert key in str(caught.value) and said in str(caught.value)


def test_profile_portable_refuses_other_widths_and_signs() -> None:
    with pytest.raises(UsageError, match="4 and 8 only"):
        load_config(None, {"model": "m", "profile": "portable", "bits": "3,4"})
    with pytest.raises(UsageError, match="positive scales"):
        load_config(None, {"model": "m", "profile": "portable", "scale_sign": "both"})


def test_refinement_needs_a_row_to_hold_out() -> None:
    load_config(None, {"model": "m", "refine_steps": 5, "num_samples": 2})
    with pytest.raises(UsageError, match="at least 2; raise num_samples"):
        load_config(None, {"model": "m", "refine_steps": 5, "num_samples": 1})
    with pytest.raises(UsageError, match="add refine_steps"):
        load_config(None, {"model": "m", "refine_learner": "gumbel"})
    with pytest.raises(UsageError, match="add refine_steps"):
        load_config(None, {"model": "m", "refine_error": "loss"})


@pytest.mark.parametrize("profile", ["auto", "portable", "transformers", "vllm"])
def test_asymmetric_grids_need_a_profile_that_takes_them(profile: str) -> None:
    values = {"model": "m", "profile": profile, "symmetric": False}
    if profile in ("vllm", "transformers"):
        assert not load_config(None, values).symmetric
        with pytest.raises(UsageError, match="scale_sign both is for symmetric grids"):
            load_config(None, values | {"scale_sign": "both"})
        return
    with pytest.raises(UsageError) as caught:
        load_config(None, values)
    message = str(caught.value)
    assert "\n" not in message
    assert f"profile {profile} takes symmetric grids only" in message
    assert "transformers 5.23 fails" in message and "--profile vllm accepts" in message


def test_shares_are_numbers_or_auto(tmp_path: Path) -> None:
    config = load_config(None, {"model": "m", "foem_beta": "auto", "target_shift": "0.5"})
    assert (config.foem_beta, config.target_shift) == ("auto", 0.5)
    # A bare off is a boolean in YAML.
    for value in ("off", '"off"', "0"):
        assert load_config(write(tmp_path, f"model: m\ntarget_shift: {value}\n"), {}).target_shift == 0
    for value in ("1.5", "best", True, "nan", 10**400):
        with pytest.raises(UsageError, match="foem_beta: expected a number from 0 to 1, or auto"):
            load_config(None, {"model": "m", "foem_beta": value})


@pytest.mark.parametrize(
    "values",
    [
        {"rounding": "rtn", "scale_refit": True},
        {"rounding": "rtn", "target_shift": "auto"},
        {"rounding": "gptaq", "target_shift": 0.5},
        {"rounding": "gptaq", "output_feedback": "auto"},
        {"rounding": "foem", "foem_form": "paper", "foem_beta": 1},
        {"token_importance": "none", "output_feedback": "auto"},
        {"token_importance": "none", "refine_steps": 4, "refine_error": "loss"},
        {"rounding": "rtn", "gram_steps": 10},
        {"rounding": "gptaq", "gram_steps": 10},
    ],
)
def test_corrections_that_do_not_fit_the_rounding_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="drop|lower"):
        load_config(None, {"model": "m", **values})


@pytest.mark.parametrize("targets", [{}, {"target_bpw": 3.5, "target_size": "1GB"}])
def test_exactly_one_target(targets: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="exactly one of --target-bpw"):
        load_config(None, {"model": "m", **targets}).require_one_target()


@pytest.mark.parametrize("text", ["- a\n- b\n", "key: [1\n"])
def test_files_that_hold_no_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="run.yaml"):
        load_config(write(tmp_path, text), {"model": "m"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits: 3.5", "widths from 2 to 8"),
        ("bits: {4: 1}", "widths from 2 to 8"),
        ("sensitivity: " + "x" * 5000, "existing sensitivity.json"),
        ("target_size: " + "9" * 400 + "GiB", "more than any disk"),
        ("target_size: '" + "x" * 9999 + "'", "is no size"),
        ("seed: 0x" + "f" * 5000, "seed"),
        ("calibration: a=" + "9" * 400, "weights above 0"),
        ("extra_metrics: [[hawq]]", "expected hawq"),
    ],
)
def test_values_that_make_no_sense_are_one_short_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load_config(write(tmp_path, f"model: m\n{text}\n"), {})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_missing_file_and_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not found"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(UsageError, match="model"):
        load_config(write(tmp_path, ""), {})


@pytest.mark.parametrize(
    ("values", "evaluates", "reads_rows"),
    [
        ({"bits": "4"}, True, True),
        ({"bits": "4", "rounding": "rtn"}, False, False),
        ({"bits": "4", "rounding": "rtn", "eval": False, "num_samples": 8}, False, False),
        ({"bits": "4", "rounding": "rtn", "eval": True}, True, True),
        ({"bits": "4", "rounding": "rtn", "num_samples": 8}, True, True),
        ({"bits": "4", "rounding": "rtn", "max_kl": 0.1}, True, True),
        ({"bits": "4", "rounding": "rtn", "eval": False, "calibration": "text.txt"}, False, True),
        ({"bits": "4", "rounding": "rtn", "eval": False, "refine_steps": 2}, False, True),
        ({"bits": "4", "rounding": "rtn", "target_bpw": 4.25}, True, True),
        ({"bits": "3,4", "rounding": "rtn", "target_bpw": 4}, True, True),
        ({"bits": "4", "eval": False}, False, True),
    ],
)
def test_data_is_read_where_something_needs_it(values: dict[str, Any], evaluates: bool, reads_rows: bool) -> None:
    config = RunConfig(model="m", **values)
    assert (config.evaluates, config.reads_rows) == (evaluates, reads_rows)


@pytest.mark.parametrize("name", NEED_EVALUATION)
def test_what_needs_an_evaluation_is_refused_without_one(name: str) -> None:
    values = {name: 0.1, "eval": False} | ({"baseline": "report.json", "max_regression": 0.1} if "base" in name else {})
    with pytest.raises(ValidationError, match=f"{name} needs the evaluation"):
        RunConfig(model="m", **values)
