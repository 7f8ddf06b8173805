"""Write docs/output.md: every key of every JSON document, from the types in hawqtool/report."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hawqtool.report import documents, schema  # noqa: E402

PAGE = ROOT / "docs" / "output.md"
DOCUMENTS = (
    schema.Report,
    documents.SensitivityDocument,
    documents.PlanDocument,
    documents.FrontierDocument,
    documents.EvaluationDocument,
    documents.ComparisonDocument,
    documents.DryRun,
    documents.GgufDocument,
    documents.VerifyDocument,
    documents.PushDocument,
    documents.ErrorDocument,
)
HEAD = """# Output files

`hawqtool quantize` writes `report.json` and `reproduce/plan.json` into the output folder, and prints the report with
`--json`. Other commands print or write the documents below. Each has the key `schema`; its number rises when a key
changes its name or its meaning. A key that is marked *optional* may be missing.

This page is made from the types in `hawqtool/report/` by `python scripts/schema_page.py`.
"""


def keys(kind: type) -> dict[str, tuple[Any, str, bool]]:
    """Type, meaning and whether it may be missing, of every key of a typed dictionary."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        inner = get_args(hint)[0] if optional else hint
        if get_origin(inner) is not Annotated:
            raise SystemExit(f"{kind.__name__}.{name} has no meaning; write Annotated[type, 'meaning']")
        value, meaning = get_args(inner)
        found[name] = (value, meaning, optional or name in kind.__optional_keys__)  # type: ignore[attr-defined]
    return found


def words(hint: Any) -> str:
    """A type as readers of JSON know it."""
    if is_typeddict(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(words(argument) for argument in arguments)
    if origin is list:
        return f"list of {words(arguments[0])}"
    if origin in (dict, Mapping):
        return "object" if arguments[1] is Any else f"{words(arguments[1])} by name"
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
    return plain[hint]


def parts(hint: Any) -> list[type]:
    """Typed dictionaries that a type is made of."""
    if is_typeddict(hint):
        return [hint]
    return [part for argument in get_args(hint) for part in parts(argument)]


def section(kind: type, level: int) -> str:
    """Heading, first line of the docstring, table of keys."""
    about = (kind.__doc__ or "").strip().splitlines()[0]
    lines = [f"{'#' * level} {kind.__name__}", "", about, "", "| key | type | meaning |", "|---|---|---|"]
    for name, (hint, meaning, optional) in keys(kind).items():
        lines.append(f"| `{name}` | {words(hint)}{', *optional*' * optional} | {meaning} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page: documents in order, each followed by its parts, each part once."""
    done: set[type] = set()
    text = [HEAD.strip()]

    def add(kind: type, level: int) -> None:
        if kind in done:
            return
        done.add(kind)
        text.append(section(kind, level))
        for hint, _, _ in keys(kind).values():
            for part in parts(hint):
                add(part, 3)

    for kind in DOCUMENTS:
        add(kind, 2)
    return "\n\n".join(text) + "\n"


def main() -> int:
    """Write the page, or with ``--check`` say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not current")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
