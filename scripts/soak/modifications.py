"""What `verify` finds: every kind of modification tried on a tiny output, as the table of docs/security.md.

python scripts/soak/modifications.py            # try all and write the table
python scripts/soak/modifications.py --check    # exit 1 if the page is not current, or something is missed silently
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/soak")]

from hawqtool.checkpoint.index import read_index  # noqa: E402
from hawqtool.errors import InputError  # noqa: E402
from hawqtool.export.verify import verify_folder  # noqa: E402
from hawqtool.formats import QuantFormat  # noqa: E402
from modifying.edits import forge  # noqa: E402
from modifying.kinds import Kind, kinds  # noqa: E402
from tests.support.packed_folder import linear_specs, write_packed  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402

PAGE = ROOT / "docs/security.md"
BEGIN, END = "<!-- modifications: begin -->", "<!-- modifications: end -->"
Found = tuple[bool, bool, bool]
"""Whether `verify` finds the edit, and with all records forged `verify` and `verify --against`."""


def main() -> int:
    """Try all kinds; write or compare the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as place:
        source, clean = build(Path(place))
        results = [(kind, tried(kind, source, clean, Path(place) / "out")) for kind in kinds()]
    silent = [kind.name for kind, found in results if not found[2] and not kind.note]
    for name in silent:
        print(f"missed without a reason: {name}", file=sys.stderr)
    text = PAGE.read_text(encoding="utf-8")
    new = f"{text.split(BEGIN)[0]}{BEGIN}\n{table(results)}{END}{text.split(END)[1]}"
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    print(f"{len(results)} kinds: verify finds {sum(f[0] for _, f in results)} of the edits")
    return int(bool(silent) or (check and new != text))


def build(place: Path) -> tuple[Path, Path]:
    """A tiny model and its packed folder, of 4 bits in groups of 32."""
    source = tiny_model("llama", place / "source")
    write_packed(source, place / "clean", dict.fromkeys(linear_specs(read_index(source)), QuantFormat(4, 32)))
    return source, place / "clean"


def tried(kind: Kind, source: Path, clean: Path, folder: Path) -> Found:
    """Modify a copy of the clean folder, then forge its records."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(clean, folder)
    kind.edit(folder)
    edited = has_problem(folder, None)
    if not (folder / "config.json").is_file():
        return edited, edited, has_problem(folder, source)
    forge(folder, source)
    return edited, has_problem(folder, None), has_problem(folder, source)


def has_problem(folder: Path, against: Path | None) -> bool:
    """Whether `verify` would end with 4."""
    try:
        return bool(verify_folder(folder, against).problems)
    except InputError:
        return True


def table(results: Sequence[tuple[Kind, Found]]) -> str:
    """The table in Markdown, a heading row per group."""
    count, edits = len(results), sum(found[0] for _, found in results)
    forged, against = (sum(found[place] for _, found in results) for place in (1, 2))
    lines = [
        f"Of {count} kinds `verify` finds {edits}. With all records forged as well, `verify` alone finds {forged} and",
        f"`verify --against` {against}; each of the others says why.",
    ]
    for group, members in groupby(results, key=lambda result: result[0].group):
        lines += [
            "",
            f"| {group} | `verify` | `verify`, forged | `--against`, forged | why not |",
            "|---|---|---|---|---|",
        ]
        for kind, found in members:
            marks = " | ".join("found" if mark else "no" for mark in found)
            lines.append(f"| {kind.name} | {marks} | {'' if found[2] else kind.note} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
