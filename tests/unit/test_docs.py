"""Documentation that is made of the program says what the program says today."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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

    table = README.read_text(encoding="utf-8").split("## Exit codes")[1].split("\n## ")[0]
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


def test_links_between_pages_lead_somewhere() -> None:
    for page in [README, *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_links_to_the_pages() -> None:
    text = README.read_text(encoding="utf-8")
    for name in ("docs/troubleshooting.md", "docs/determinism.md", "docs/commands/README.md"):
        assert f"]({name})" in text, name
