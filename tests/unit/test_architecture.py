"""House rules that a program can check: import direction, sizes, names, a light command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hawqtool"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

BASE = {"formats", "records", "errors", "parsing"}
SOURCES = {"model", "data"}
STAGES = {"sensitivity", "allocation", "rounding", "export", "evaluation", "report"}
ALLOWED: dict[str, set[str]] = {
    "formats": {"errors"},
    "records": {"formats", "errors"},
    "errors": set(),
    "parsing": set(),
    "values": {"formats", "parsing"},
    **dict.fromkeys(SOURCES, SOURCES | BASE),
    **dict.fromkeys(STAGES, SOURCES | BASE),
    "config": BASE | {"values"},
    "pipeline": STAGES | SOURCES | BASE | {"config", "values"},
    "cli": STAGES | SOURCES | BASE | {"config", "values", "pipeline"},
    "__main__": {"cli"},
    "__init__": set(),
}
# The scores are those of the real rounding, so each width is rounded while it is measured.
# Measured scores are the divergence that plans are judged by.
ALLOWED["sensitivity"] = ALLOWED["sensitivity"] | {"rounding", "evaluation"}
# Plans are arithmetic: nothing of models or tensors belongs there.
ALLOWED["allocation"] = BASE
# What a report says needs the report alone.
ALLOWED["report"] = BASE


def part_of(path: Path) -> str:
    """First component of a module below the package: ``rounding`` for ``hawqtool/rounding/grid.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST, path: Path) -> set[str]:
    """Absolute names of all imported modules, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join((*package, base) if base else package)
            found.add(base)
            # `from hawqtool import rounding` names the part only here.
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the design: add it to ALLOWED with what it may import"
    used = {name.split(".")[1] for name in imported_modules(parse(path), path) if name.startswith("hawqtool.")}
    known = {module for module in used if module in ALLOWED}
    wrong = known - ALLOWED[part] - {part}
    assert not wrong, f"{identify(path)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize(
    "path", [path for part in ("allocation", "report") for path in sorted((PACKAGE / part).glob("*.py"))], ids=identify
)
def test_plans_and_cards_need_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported_modules(parse(path), path)} & {"torch", "transformers"}


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, (
        f"{identify(path)} has {lines} lines, at most {MAX_FILE_LINES} are allowed: split it"
    )


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, body_only: bool) -> int:
    """Lines of a function, decorators left out; of a command only the body, as its signature is the interface."""
    assert node.end_lineno is not None
    return node.end_lineno - (node.body[0].lineno if body_only else node.lineno) + 1


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_functions_are_short(path: Path) -> None:
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {f"{n.name} (line {n.lineno})": function_lines(n, part_of(path) == "cli") for n in functions}
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES}
    assert not long, f"{identify(path)} has functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def test_files_say_what_they_are() -> None:
    vague = [identify(path) for path in MODULES if path.stem in {"utils", "helpers", "common", "util", "misc"}]
    assert not vague, f"name these after their one job: {', '.join(vague)}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_modules_have_a_docstring(path: Path) -> None:
    tree = parse(path)
    assert not tree.body or ast.get_docstring(tree), f"{identify(path)} does not say what it is for"


def test_help_loads_no_heavy_library() -> None:
    # runpy executes the package as `python -m hawqtool --help` does, and lets us look at sys.modules afterwards.
    program = (
        "import runpy, sys\n"
        "sys.argv = ['hawqtool', '--help']\n"
        "code = None\n"
        "try:\n"
        "    runpy.run_module('hawqtool', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as leave:\n"
        "    code = leave.code\n"
        "heavy = sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules))\n"
        "print('code', code, 'heavy', heavy, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().endswith("code 0 heavy []"), result.stderr
    assert "quantize" in result.stdout
