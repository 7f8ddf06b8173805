"""Documentation that is made of the program says what the program says today."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import (
    broken_links,
    figures_without_origin,
    first_command_line,
    lost_paths,
    refused_commands,
    sections,
    tables,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGE = DOCS / "troubleshooting.md"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def message_page(scripts: None) -> Any:
    import message_page

    return message_page


def rows(text: str) -> list[str]:
    """First cells of the tables."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]


def section(text: str, code: int, name: str) -> str:
    found = re.search(rf"^## {code}: {name}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"troubleshooting.md has no section '## {code}: {name}'"
    return found[0]


def test_command_pages_are_current(scripts: None) -> None:
    import command_pages

    wanted = command_pages.pages()
    assert {f"{name}.md" for name in ("quantize", "measure", "allocate", "verify")} <= set(wanted)
    stale = [name for name, text in wanted.items() if not command_pages.is_current(name, text)]
    gone = {path.name for path in command_pages.PAGES.iterdir()} - set(wanted)
    assert not stale and not gone, "run python scripts/command_pages.py"


def test_the_page_of_messages_is_current(message_page: Any) -> None:
    assert message_page.PAGE.read_text(encoding="utf-8") == message_page.page(), "run python scripts/message_page.py"


def test_the_reader_of_messages_sees_them(message_page: Any) -> None:
    tree = ast.parse("f'a {x} b' + 'c'", mode="eval")
    assert message_page.skeleton(tree.body) == "a … bc"
    found = message_page.messages()
    assert set(found) == set(message_page.exit_codes()) - {"HawqError"}
    assert sum(map(len, found.values())) > 150


def test_every_error_class_has_a_section_with_messages_of_its_own(message_page: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, code in message_page.exit_codes().items():
        if name == "HawqError":
            continue  # never raised itself
        assert rows(section(text, code, name)), name


def test_every_message_of_the_page_exists(message_page: Any) -> None:
    said = []
    for path in sorted((ROOT / "hawqtool").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = message_page.skeleton(node)
            said += [text] if text else []
    for cell in rows(PAGE.read_text(encoding="utf-8")):
        parts = re.findall(r"`([^`]+)`", cell)
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in said), f"no message has {cell}"


def test_documented_exit_codes_are_those_of_the_program(message_page: Any) -> None:
    from hawqtool.cli.session import INTERRUPTED, TERMINATED

    table = dict(sections(PAGE.read_text(encoding="utf-8")))["Exit codes"]
    documented = {
        int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in cell.split(",")
    }
    assert documented == {0, 1, INTERRUPTED, TERMINATED, *message_page.exit_codes().values()}


def test_every_documented_exit_code_is_tested() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for code in (0, 2, 3, 4, 5):
        assert re.search(rf"(exit_code|returncode) == {code}\b|Case\(\s*{code},", tests), code
    # Signals are sent to a run under way, see tests/cli/test_cli.py.
    for name, code in (("SIGINT", 130), ("SIGTERM", 143)):
        assert re.search(rf"{name}, {code}\b", tests), name


def test_a_bug_is_a_traceback_with_exit_code_1() -> None:
    program = "from hawqtool.cli.session import session\nwith session():\n    raise KeyError('never expected')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" in done.stderr


def pages() -> list[Path]:
    return [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def program() -> Any:
    import typer

    from hawqtool.cli.app import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    assert not lost_paths(ROOT, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path, program: Any) -> None:
    assert not refused_commands(program, page.read_text(encoding="utf-8"))


def test_figures_name_commit_machine_and_command() -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    assert sum(len(tables(body)) for _, body in sections(results)) > 0
    shown = dict(sections(README.read_text(encoding="utf-8")))["Results"]
    assert not figures_without_origin(results)
    assert not figures_without_origin(f"## Results\n{shown}")


def test_results_of_the_readme_are_those_of_the_page() -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    (rows,) = tables(dict(sections(README.read_text(encoding="utf-8")))["Results"])
    assert 0 < len(rows) <= 5 and set(rows) <= set(results)


def test_the_readme_is_short_and_begins_with_a_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert 0 < first_command_line(text) <= 40


@pytest.fixture
def model_page(scripts: None) -> Any:
    import model_page

    return model_page


def test_the_tables_of_models_have_the_form_of_their_script(model_page: Any) -> None:
    record = {"task": "CAUSAL_LM", "model_type": "llama", "cls": "LlamaForCausalLM", "status": "supported"}
    record |= {
        "key": "1",
        "verify": 0,
        "diff": 0.0,
        "log": "m: 2 blocks, 14 linears in 8 units, kept 1 kB (0.5 % of the weights)",
    }
    refused = record | {"key": "2", "model_type": "t5", "status": "refused", "log": "error: a|b\n  of MODEL"}
    rows = [model_page.row_of(each) for each in (record, refused)]
    text = model_page.generated(rows, "Swept.")
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    shown = page.partition(model_page.BEGIN)[2].partition(model_page.END)[0]
    heads = {
        line
        for line in text.splitlines()
        if line.startswith(("| type", "| model", "| family")) and "crashed" not in line
    }
    assert {head for head in heads if not head.startswith("| family")} <= set(shown.splitlines())
    assert "| `llama` | `LlamaForCausalLM` | 2 | 14 in 8 | 0.5 % | T | 0 |" in text
    assert "| `t5` | `LlamaForCausalLM` | refused: a\\|b of MODEL |" in text
    assert model_page.with_generated(page, shown.strip()) == page


def test_every_model_that_people_ask_for_has_a_row(model_page: Any) -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} | `" in page for name in model_page.WELL_KNOWN)
    counted = re.search(r"(\d+) of (\d+) classes are supported", page)
    assert counted and re.search(rf"^\| all \| {counted[2]} \| {counted[1]} \|", page, re.MULTILINE)


def test_every_page_can_be_found_from_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    generated = {path for path in (DOCS / "commands").iterdir() if path.name != "README.md"}
    for page in set(DOCS.rglob("*.md")) - generated - {DOCS / "README.md"}:
        assert f"]({page.relative_to(DOCS)})" in index, page.name
    assert "](docs/README.md)" in README.read_text(encoding="utf-8")


PLANTED_LINKS = {
    "a lost file": "[a](lost.md)",
    "a lost picture": "![a](images/lost.svg)",
    "a lost heading": "# Here\n[a](#there)",
    "a lost heading of another page": "[a](docs/README.md#no-such-heading)",
    "a heading in code only": "```\n# There\n```\n[a](#there)",
}


@pytest.mark.parametrize("name", PLANTED_LINKS)
def test_a_broken_link_is_found(name: str) -> None:
    assert broken_links(README, PLANTED_LINKS[name])


def test_a_file_that_is_not_there_is_found() -> None:
    assert lost_paths(ROOT, "Run `scripts/lost.py`.") == lost_paths(ROOT, "```\npython scripts/lost.py\n```")
    assert lost_paths(ROOT, "Run scripts/lost.py.") and not lost_paths(
        ROOT, "see `scripts/test`, ./scripts/x, OUT/docs/y"
    )


def test_good_links_pass() -> None:
    text = "# Here, and `there`\n[a](#here-and-there) [b](docs/README.md) [c](https://example.org/x) `[d](lost.md)`"
    assert not broken_links(README, text)


PLANTED_COMMANDS = {
    "an unknown flag": "hawqtool quantize MODEL -o OUT --targetbpw 3.5",
    "an unknown command": "hawqtool quantise MODEL",
    "a number that is none": "hawqtool quantize MODEL -o OUT --target-bpw small",
    "a flag without its value": "hawqtool quantize MODEL -o",
    "a missing argument": "hawqtool verify",
    "a fault in the second line": "hawqtool quantize MODEL \\\n    --outputs OUT",
    "a fault behind a comment line": "# all\n$ hawqtool quantize MODEL --outputs OUT > x",
}


@pytest.mark.parametrize("name", PLANTED_COMMANDS)
def test_a_wrong_command_is_found(name: str, program: Any) -> None:
    assert refused_commands(program, f"```console\n{PLANTED_COMMANDS[name]}\n```\n")


def test_right_commands_pass(program: Any) -> None:
    good = "hawqtool quantize MODEL -o OUT --target-bpw 3.5 --json > report.json  # a comment\nhawqtool verify --help"
    assert not refused_commands(program, f"```\n{good}\n```\nhawqtool is no command here\n")


@pytest.mark.parametrize("missing", ["Commit", "Machine", "Command"])
def test_a_table_without_its_origin_is_found(missing: str) -> None:
    lines = {"Commit": "- Commit: `0123abc`", "Machine": "- Machine: two cores", "Command": "- Command: `hawqtool`"}
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert not figures_without_origin("## One\n" + "\n".join(lines.values()) + "\n\n" + table)
    left = "\n".join(line for word, line in lines.items() if word != missing)
    assert figures_without_origin(f"## One\n{left}\n\n{table}")
    assert figures_without_origin(f"## One\n{left}\n\n{table}\n## Two\n{lines[missing]}\n")


def test_the_first_command_is_found() -> None:
    assert first_command_line("# Title\n\n```bash\nscripts/demo\n```\n") == 4
    assert first_command_line("scripts/demo\n") == 0
