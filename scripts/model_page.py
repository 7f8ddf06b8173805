"""Write the tables of docs/models.md from the results of a sweep over the architectures of transformers.

A sweep makes a tiny random model of every class in transformers' tables, quantizes it with the command line, verifies
the folder, loads it and compares its outputs with those of the dequantized weights. Its results are JSON lines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from model_names import WELL_KNOWN  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- from a sweep: begin -->", "<!-- from a sweep: end -->"
SUPPORTED, UNKNOWN, WRONG, REFUSED, CRASHED, NOT_BUILT = (
    *("supported", "not compared", "does not load", "refused", "crashed", "not built"),
)
OUTCOMES = (SUPPORTED, UNKNOWN, WRONG, REFUSED, CRASHED, NOT_BUILT)
_TRANSFORMERS = "transformers with compressed-tensors"
LARGEST_DIFFERENCE = 1e-3
FAMILIES = {
    "CAUSAL_LM": "Language models",
    "IMAGE_TEXT_TO_TEXT": "Multimodal models",
    "MASKED_LM": "Masked language models",
    "SEQUENCE_CLASSIFICATION": "Sequence classifiers",
    "IMAGE_CLASSIFICATION": "Image classifiers",
    "SEQ_TO_SEQ_CAUSAL_LM": "Encoder-decoders",
    "SPEECH_SEQ_2_SEQ": "Speech to text",
    "CTC": "Speech recognition by CTC",
    "AUDIO_CLASSIFICATION": "Sound classifiers",
    "EXTRA": "Base models",
}
"""Heading of each table, by transformers' name of the task, in the order of the page."""

_ENGINES = {"vLLM (CUDA)": "V", "vLLM (CPU)": "C", "SGLang (CUDA)": "S"}
_COUNTS = re.compile(r"(\d[\d,]*) linears in (\d[\d,]*) units")
_BLOCKS = re.compile(r"(\d[\d,]*) blocks?\b")
_KEPT = re.compile(r"\(([\d.]+ %) of the weights\)")
_LONGEST_REASON = 230


@dataclass(frozen=True)
class Row:
    """What came out for one class.

    Args:
        family: Key of `FAMILIES`.
        model_type: As in config.json.
        name: Class, behind ``#`` a variant of its settings.
        outcome: One of `OUTCOMES`.
        blocks: How many blocks, of which kinds where the config names them.
        quantized: Linears and allocation units.
        kept: Share of the bytes that stay as they are beside embeddings and head.
        loads: Letters of the engines that load the folder.
        difference: Largest difference of the outputs; None where the sweep did not compare them.
        reason: Why not.
        alone: The one format that transformers loads it in, where 4 bits do not load.
    """

    family: str
    model_type: str
    name: str
    outcome: str
    blocks: str = ""
    quantized: str = ""
    kept: str = ""
    loads: str = ""
    difference: float | None = None
    reason: str = ""
    alone: str = ""

    @property
    def shown_name(self) -> str:
        """The class, with its variant."""
        name, _, variant = self.name.partition("#")
        return ", ".join(part for part in (f"`{name}`", variant, self.alone) if part)


def read_results(path: Path) -> list[Row]:
    """Rows of a file of results; the last line of a class counts."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[record["key"]] = record
    rows = [row_of(record) for record in found.values()]
    return sorted(rows, key=lambda row: (row.model_type.lower(), row.name))


def row_of(record: Mapping[str, Any]) -> Row:
    """Row of a record of the sweep."""
    family = record["task"] if record["task"] in FAMILIES else record["key"].partition(":")[0]
    place = (family, record["model_type"], record["cls"])
    outcome = outcome_of(record)
    if outcome != SUPPORTED:
        return Row(*place, outcome, reason=reason_of(record))
    log = record.get("log", "")
    counts, kept = _COUNTS.search(log), _KEPT.search(log)
    loads = "".join(_ENGINES[name] for name, loaded in record.get("engines") or () if loaded and name in _ENGINES)
    return Row(
        *place,
        outcome,
        blocks_of(record),
        f"{counts[1]} in {counts[2]}" if counts else "",
        kept[1] if kept else "0 %",
        ("T" if "diff" in record or _tried(record) else "") + loads,
        record.get("diff"),
        alone=str(record.get("retried") or "").removeprefix("--formats "),
    )


def outcome_of(record: Mapping[str, Any]) -> str:
    """One of `OUTCOMES`."""
    status = record["status"]
    if status == "supported":
        if record.get("verify") != 0:
            return WRONG
        if record["cls"].endswith("#vllm-profile"):
            return SUPPORTED
        if "diff" in record:
            return SUPPORTED if record["diff"] < LARGEST_DIFFERENCE else WRONG
        # The sweep feeds one kind of input, which some classes do not take alone; the run has tried the folder itself.
        return {True: SUPPORTED, False: WRONG, None: UNKNOWN}[_tried(record)]
    return {"refused": REFUSED, "usage": REFUSED, "not built": NOT_BUILT}.get(status, CRASHED)


def _tried(record: Mapping[str, Any]) -> bool | None:
    """Whether the run's own trial loaded the folder in transformers; None where nothing was tried."""
    return next((loads for name, loads in record.get("engines") or () if name == _TRANSFORMERS), None)


def blocks_of(record: Mapping[str, Any]) -> str:
    """How many blocks were walked, and their kinds in the config's words."""
    count = _BLOCKS.search(record.get("log", ""))
    kinds = ", ".join(sorted({kind.replace("_", " ") for kind in record.get("layer_types") or ()}))
    number = count[1] if count else str(record.get("layers") or "")
    return f"{number}: {kinds}" if kinds else number


def reason_of(record: Mapping[str, Any]) -> str:
    """Why a class is not supported, in one line fit for a table."""
    if "load_error" in record or (record["status"] == "supported"):
        text = record.get("load_error") or f"outputs differ by {record.get('diff', 0.0):.2g}"
    else:
        text = _message(record.get("log", "")) or record.get("reason", "")
    text = re.sub(r"\s+\[\w+\.py:\d+\]$", "", " ".join(text.split()))
    text = re.sub(r"(?<!\w)/\S*/src\b", "MODEL", text.removeprefix("error: "))
    text = re.sub(r"(?<!\w)/\S*/(?=[\w-]+\.(wav|png|txt)\b)", "", text)
    text = re.sub(r"[|`<>*_\[\]]", lambda found: "\\" + found[0], text)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON].rstrip()} …"


def _message(log: str) -> str:
    """The error message at the end of a log, whose long lines are folded; of a traceback the last line."""
    begin = log.rfind("error: ")
    if begin >= 0:
        return log[begin:]
    lines = [line for line in log.splitlines() if line and not line.startswith("the finished work is kept")]
    return lines[-1] if lines else ""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def counts_table(rows: list[Row]) -> str:
    """How many classes of each family came out how."""
    counts = {family: Counter(r.outcome for r in rows if r.family == family) for family in FAMILIES}
    shown = [outcome for outcome in OUTCOMES if any(c[outcome] for c in counts.values())]
    lines = [(FAMILIES[family], str(sum(c.values())), *(str(c[o]) for o in shown)) for family, c in counts.items() if c]
    total = Counter(row.outcome for row in rows)
    return table(("family", "classes", *shown), [*lines, ("all", str(len(rows)), *(str(total[o]) for o in shown))])


def known_table(rows: list[Row]) -> str:
    """The models that people ask for, by the name that they are known under."""
    lines = []
    for name, types in WELL_KNOWN.items():
        found = [row for wanted in types for row in rows if _is(row, wanted)]
        unnamed = f"`{'`, `'.join(types)}`"
        lines.append((name, ", ".join(dict.fromkeys(f"`{r.model_type}`" for r in found)) or unnamed, _judgement(found)))
    return table(("model", "type", "result"), lines)


def _is(row: Row, wanted: str) -> bool:
    """Whether a row is of a type, or of the class or variant that stands behind a colon."""
    model_type, _, name = wanted.partition(":")
    return row.model_type == model_type and (not name or name in row.name)


def _judgement(rows: list[Row]) -> str:
    """Outcomes of some rows in a few words."""
    if not rows:
        return "not in this version of transformers"
    told: dict[str, list[str]] = {}
    for row in rows:
        good = f"supported in {row.alone} alone" if row.alone else SUPPORTED
        told.setdefault(good if row.outcome == SUPPORTED else f"{row.outcome}: {row.reason}", []).append(row.shown_name)
    if len(told) == 1:
        return next(iter(told))
    return "; ".join(f"{', '.join(dict.fromkeys(names))} {text}" for text, names in told.items())


def family_section(family: str, rows: list[Row]) -> str:
    """Tables of one family: what works, then what does not."""
    good = [r for r in rows if r.outcome == SUPPORTED]
    bad = [r for r in rows if r.outcome != SUPPORTED]
    parts = [f"### {FAMILIES[family]}"]
    if good:
        head = ("type", "class", "blocks", "linears in units", "kept", "loads", "difference")
        cells = [(f"`{r.model_type}`", r.shown_name, r.blocks, r.quantized, r.kept, r.loads, _shown(r)) for r in good]
        parts.append(table(head, cells))
    if bad:
        reasons = [(f"`{r.model_type}`", r.shown_name, f"{r.outcome}: {r.reason}") for r in bad]
        parts.append(table(("type", "class", "not supported"), reasons))
    return "\n\n".join(parts)


def _shown(row: Row) -> str:
    if row.difference is not None:
        return f"{row.difference:.2g}"
    return "trial" if "T" in row.loads else "not loaded"


def generated(rows: list[Row], origin: str) -> str:
    """All that stands between the marks of the page."""
    supported = [row for row in rows if row.outcome == SUPPORTED]
    count = sum(bool(row.alone) for row in supported)
    alone = f", {count} of them in 8-bit floats alone" if count else ""
    families = [f for f in FAMILIES if any(row.family == f for row in rows)]
    parts = [
        "## The sweep",
        f"{len(supported)} of {len(rows)} classes are supported{alone}. {origin}",
        _LEGEND,
        counts_table(rows),
        "### Models that people ask for",
        known_table(rows),
        *(family_section(family, [row for row in rows if row.family == family]) for family in families),
    ]
    return "\n\n".join(parts)


_LEGEND = """Each class of transformers' tables is built small (2 or more blocks of width 64) with random weights,
quantized by `hawqtool quantize --bits 4 --group-size 32`, verified, and loaded; its outputs are compared with those of
the same model with dequantized weights. Nothing is said here about quality.

- blocks: how many, and the kinds that config.json names;
- linears in units: quantized linears, and the allocation units that they form;
- kept: share of the tensor bytes that stay as they are beside embeddings and head;
- loads: T transformers (done), V vLLM on CUDA, C vLLM on CPUs, S SGLang (by rules, see [engines](#engines));
- difference: the largest between the two models' outputs; *trial*: the sweep has no inputs for the class, and the
  run's own trial has loaded the folder and compared a forward pass. Variants of a class stand behind a comma;
- *fp8* behind a class: transformers does not load it at 4 bits, so `--formats fp8` was swept (see
  [what loading initializes](#what-loading-initializes)).

This part of the page is made by `python scripts/model_page.py RESULTS.jsonl`."""


def with_generated(page: str, text: str) -> str:
    """The page with other text between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, help="results of a sweep, JSON lines")
    parser.add_argument("--commit", help="commit that was swept (default: the current one)")
    parser.add_argument("--fp8-commit", help="commit at which classes marked fp8 were swept, if another")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="day of the sweep")
    for package in ("transformers", "compressed-tensors"):
        parser.add_argument(f"--{package}", default=metadata.version(package), help="version (default: installed)")
    options = parser.parse_args()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = options.commit or subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    versions = f"transformers {options.transformers}, compressed-tensors {options.compressed_tensors}"
    origin = f"Swept on {options.date} at commit `{commit.strip()}` with {versions}."
    if options.fp8_commit:
        origin += f"\nThose marked fp8 were swept at `{options.fp8_commit}`."
    rows = read_results(options.results)
    PAGE.write_text(with_generated(PAGE.read_text(encoding="utf-8"), generated(rows, origin)), encoding="utf-8")
    print(f"{len(rows)} classes: {dict(Counter(row.outcome for row in rows))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
