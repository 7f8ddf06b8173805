"""The workflow file of docs/guides/ci.md, and the script that runs its steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
import yaml

from hawqtool.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "scripts/ci_example").read_text(encoding="utf-8")


def job() -> dict[str, Any]:
    page = (ROOT / "docs/guides/ci.md").read_text(encoding="utf-8")
    workflows = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    (workflow,) = [found for found in workflows if "jobs" in found]
    (found,) = workflow["jobs"].values()
    assert isinstance(found, dict)
    return found


def commands() -> dict[str, str]:
    return {step["name"]: step["run"] for step in job()["steps"] if "run" in step}


def test_the_script_runs_the_steps_of_the_workflow() -> None:
    steps = {
        name.lower(): text for name, text in re.findall(r"^(\w+)=\$\(cat <<'STEP'\n(.*?)^STEP", SCRIPT, re.M | re.S)
    }
    assert steps == commands()


def test_every_variable_of_a_step_is_set_by_workflow_and_script() -> None:
    used = {name for text in commands().values() for name in re.findall(r"\$(\w+)", text)}
    assert used and used <= set(job()["env"])
    assert all(f" {name}=" in SCRIPT for name in used)


def test_files_and_flags_of_the_steps_exist() -> None:
    program: Any = typer.main.get_command(app)
    flags = {spelling for parameter in program.commands["quantize"].params for spelling in parameter.opts}
    words = commands()["quantize"].split()
    assert {word for word in words if word.startswith("-")} <= flags
    for text in commands().values():
        for path in re.findall(r"(?:configs|scripts)/[\w.-]+", text):
            assert (ROOT / path).is_file(), path


def test_what_the_job_keeps_is_what_the_step_writes() -> None:
    (keep,) = [step for step in job()["steps"] if "upload-artifact" in step.get("uses", "")]
    assert keep["if"] == "always()"
    assert all(path in commands()["quantize"] for path in keep["with"]["path"].split())
