"""Help pages, completion and the nearest word."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.config import SETTINGS
from hawqtool.settings.metadata import flag_of

WIDTH = {"COLUMNS": "80", "NO_COLOR": "1"}
"""Without TERMINAL_WIDTH, which typer reads once in a process, so that one test would decide on others' pages."""


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env=WIDTH)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_leaves_expert_options_to_help_all() -> None:
    short, long = shown("quantize", "-h"), shown("quantize", "--help-all")
    for name, setting in SETTINGS.items():
        if name != "model":
            flag = (setting.flags or (flag_of(name),))[0].partition("/")[0]
            line = f"\u2502 {flag} "
            assert line in long and (line in short) != setting.expert, name
    assert "Expert" in long and "Expert" not in short and "--help-all" in short


@pytest.mark.parametrize("command", ["", *(command.name or "" for command in app.registered_commands)])
def test_help_pages_fit_80_columns_and_show_nothing_for_switches(command: str) -> None:
    text = shown(*command.split(), "-h")
    assert "<bool>" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("quantise", "x"), "quantize"),
        (("quantize", "x", "--bit", "4"), "--bits"),
        (("quantize", "x", "--rounding", "gtpq"), "did you mean 'gptq'"),
        (("quantize", "x", "--preset", "balancd"), "did you mean 'balanced'"),
    ],
)
def test_what_was_meant_is_named(arguments: tuple[str, ...], word: str) -> None:
    result = CliRunner().invoke(app, arguments, env=WIDTH)
    assert result.exit_code == 2 and word in result.stderr


@pytest.mark.parametrize(
    ("line", "found"), [("quantize --preset ba", ["balanced"]), ("quantize --rounding g", ["gptq", "gptaq"])]
)
def test_a_shell_completes_words(line: str, found: list[str]) -> None:
    asked = {"_HAWQTOOL_COMPLETE": "complete_bash", "COMP_WORDS": f"hawqtool {line}", "COMP_CWORD": "3"}
    result = CliRunner().invoke(app, [], env=asked, prog_name="hawqtool")
    assert result.output.split() == found
