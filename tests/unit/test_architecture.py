"""House rules that a program can check: import direction, sizes, names, a light command line.

Each rule is a function from a source file to what is wrong with it, and is tried on a planted violation.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hawqtool"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(path for kind in ("unit", "reference") for path in (ROOT / "tests" / kind).rglob("test_*.py"))

LAYERS = (
    *("errors", "formats", "records", "report.plan_comparison", "report.schema", "report.documents"),
    *("parsing", "values", "settings", "presets", "config"),
    *("runtime",),
    *("checkpoint", "model", "rounding.kernels", "rounding", "rounding.learned", "streaming", "data"),
    *("evaluation", "sensitivity", "sensitivity.curvature", "allocation", "export", "report", "report.page"),
    *(
        "pipeline.run",
        "pipeline.load_trial",
        "pipeline.stages",
        "pipeline.search",
        "pipeline.gguf",
        "pipeline.inspection",
    ),
    *("pipeline", "pipeline.batch"),
    *("api", "cli", "__main__"),
)
"""From the bottom to the top: a module imports from its own layer and from those before it."""

WITHOUT_TENSORS = ("allocation", "report", "report.page")
"""Plans are arithmetic, and what a report says needs the report alone: neither torch nor transformers there."""

NOUNS = {"drawing", "mixing", "packing", "parsing", "training", "wording"}
"""Module names that end like a gerund and are the field's nouns."""

VAGUE = {"common", "helpers", "misc", "util", "utils"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MODULES, MAX_PARAMETERS = 400, 60, 12, 7


def layer_of(module: str) -> str | None:
    """Longest layer that a dotted module name below the package lies in; None outside all layers."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYERS), None)


def dotted(path: Path, root: Path = PACKAGE) -> str:
    """``rounding.grid`` for ``hawqtool/rounding/grid.py``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> set[str]:
    """Absolute names of all imported modules, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            # `from hawqtool import rounding` names the layer only here.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports that point upwards, relative ones, and tensors where none belong."""
    tree, layer = ast.parse(source), layer_of(module)
    if layer is None:
        return [f"{module} is in no layer"] if module != "__init__" else []
    wrong = [f"line {n.lineno} is relative" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    for name in sorted(imported_modules(tree)):
        head, _, rest = name.partition(".")
        target = layer_of(rest) if head == "hawqtool" and rest else None
        if target is not None and LAYERS.index(target) > LAYERS.index(layer):
            wrong.append(f"{name} lies above {layer}")
        if head in {"torch", "transformers"} and layer in WITHOUT_TENSORS:
            wrong.append(f"{layer} needs no {head}")
    return wrong


def long_parts(module: str, source: str) -> list[str]:
    """A file or a function of too many lines; of a command only the body counts, as its signature is the interface."""
    lines = len(source.splitlines())
    wrong = [f"{lines} lines"] if lines > MAX_FILE_LINES else []
    for node in functions(source):
        first = node.body[0].lineno if module.startswith("cli.") else node.lineno
        size = (node.end_lineno or first) - first + 1
        if size > MAX_FUNCTION_LINES:
            wrong.append(f"{node.name} has {size} lines")
    return wrong


def wide_functions(module: str, source: str) -> list[str]:
    """Functions with too many parameters; commands and compiled kernels may have them."""
    if module.startswith(("cli.", "rounding.kernels.")):
        return []
    wrong = []
    for node in functions(source):
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in given if name not in ("self", "cls")])
        if count > MAX_PARAMETERS:
            wrong.append(f"{node.name} (line {node.lineno}) has {count} parameters")
    return wrong


def wrong_names(module: str, source: str) -> list[str]:
    """Names that say nothing, gerunds, and a file without a first line that says what it is."""
    stem = module.rpartition(".")[2]
    wrong = [f"{stem} says nothing"] if stem in VAGUE else []
    if stem.endswith("ing") and stem not in NOUNS and (PACKAGE / module.replace(".", "/")).with_suffix(".py").exists():
        wrong.append(f"{stem} is a gerund")
    tree = ast.parse(source)
    return wrong if not tree.body or ast.get_docstring(tree) else [*wrong, "no docstring"]


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file."""
    return (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def crowded_folders(files: list[Path]) -> list[str]:
    """Folders of too many modules; ``cli`` holds one a command."""
    counts = Counter(path.parent for path in files if path.name != "__init__.py" and path.parent.name != "cli")
    return [f"{folder.name} holds {n} modules" for folder, n in counts.items() if n > MAX_MODULES]


def astray_tests(tests: list[Path], modules: set[str]) -> list[str]:
    """Test files that no module has: tests/unit/<package>/test_<module>.py, or test_<module>_<topic>.py."""
    wrong = []
    for path in tests:
        kind = path.parents[[p.name in ("unit", "reference") for p in path.parents].index(True)]
        folder = dotted(path.parent, kind) if path.parent != kind else ""
        words = path.stem.removeprefix("test_").split("_")
        stems = ("_".join(words[:length]) for length in range(1, len(words) + 1))
        if not any((f"{folder}.{stem}" if folder else stem) in modules for stem in stems):
            wrong.append(str(path.relative_to(kind)))
    return wrong


ABOUT_THE_PROJECT = {"test_architecture.py", "test_docs.py"}
RULES = (wrong_imports, long_parts, wide_functions, wrong_names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_file_keeps_the_rules(path: Path, rule: object) -> None:
    assert callable(rule)
    wrong = rule(dotted(path), path.read_text(encoding="utf-8"))
    assert not wrong, f"{dotted(path)}: {wrong}"


def test_folders_hold_few_modules() -> None:
    assert not crowded_folders(MODULES)


def test_tests_mirror_the_package() -> None:
    modules = {dotted(path) for path in MODULES}
    assert not astray_tests([path for path in TESTS if path.name not in ABOUT_THE_PROJECT], modules)


PLANTED = {
    "upwards": (wrong_imports, "rounding.grid", "from hawqtool.streaming.stream import ModelStream"),
    "upwards by the package": (wrong_imports, "model.tasks", "from hawqtool import pipeline"),
    "upwards inside a package": (wrong_imports, "pipeline.run.job", "from hawqtool.pipeline.stages.rows import x"),
    "upwards in a function": (wrong_imports, "export.layout", "def f():\n    import hawqtool.cli.app"),
    "a relative import": (wrong_imports, "rounding.grid", "from . import factor"),
    "no layer": (wrong_imports, "lonely", ""),
    "tensors in plans": (wrong_imports, "allocation.exact", "import torch"),
    "a long file": (long_parts, "rounding.grid", "x = 1\n" * (MAX_FILE_LINES + 1)),
    "a long function": (long_parts, "rounding.grid", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    "a wide function": (wide_functions, "rounding.grid", "def f(a, b, c, d, e, f, g, *, h): ..."),
    "a gerund": (wrong_names, "pipeline.walking", '"""Walk."""'),
    "a vague name": (wrong_names, "rounding.utils", '"""Things."""'),
    "no docstring": (wrong_names, "rounding.grid", "x = 1"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, module, source = PLANTED[name]
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert rule(module, source)


def test_a_crowded_folder_and_a_test_astray_are_found(tmp_path: Path) -> None:
    assert crowded_folders([tmp_path / f"m{number}.py" for number in range(MAX_MODULES + 1)])
    assert not crowded_folders([tmp_path / f"m{number}.py" for number in range(MAX_MODULES)])
    tests = [tmp_path / "unit/rounding" / name for name in ("test_grid.py", "test_grid_ties.py", "test_lost.py")]
    assert astray_tests(tests, {"rounding.grid"}) == ["rounding/test_lost.py"]


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
