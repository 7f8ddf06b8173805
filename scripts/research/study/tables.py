"""Results as CSV files and as one Markdown file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hawqtool.formats import parse_label
from study.plans import plan_rows

PLAIN = "forward + backward"
Findings = Mapping[str, Any]


def write_tables(folder: Path, findings: Findings) -> None:
    """Write ``scores.csv``, ``plans.csv`` and ``study.md``, each as far as there is something to say."""
    if findings["scores"]:
        _write_csv(folder / "scores.csv", score_rows(findings))
    if findings["plans"]:
        rows = plan_rows(findings)
        _write_csv(folder / "plans.csv", [_flat(row) for row in rows])
    (folder / "study.md").write_text("\n".join(markdown(findings)) + "\n", encoding="utf-8")


def score_rows(findings: Findings) -> list[dict[str, Any]]:
    """One row for every unit and format."""
    rows = []
    first = next(iter(findings["scores"].values()))
    for unit, by_label in first.items():
        for label in by_label:
            row: dict[str, Any] = {"unit": unit, "format": label, "bits": parse_label(label).bits}
            sources = {"measured": findings["truth"] or {}} | findings["scores"]
            for name, scores in sources.items():
                row[name], row[f"{name}_stderr"] = scores.get(unit, {}).get(label, (None, None))
            rows.append(row)
    return rows


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if key != "predicted"}
    return plain | {f"predicted_{metric}": value for metric, value in row["predicted"].items()}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(findings: Findings) -> list[str]:
    """Lines of ``study.md``."""
    settings = findings["settings"]
    rows = settings["rows"]
    lines = [f"# Sensitivity metrics on {settings['model']}", ""]
    lines += [
        f"- {role}: {' x '.join(map(str, found['shape']))}, {found['source']}, fingerprint {found['fingerprint'][:12]}"
        for role, found in rows.items()
    ]
    lines.append(
        f"- widths {', '.join(map(str, settings['bits']))}, group size {settings['group_size'] or 'channel'}, rounding "
        f"{settings['rounding']}, seed {settings['seed']}, {settings['device']}, {settings['dtype']}"
    )
    if findings["agreement"]:
        lines += ["", *_agreement(findings["agreement"])]
    if findings["plans"]:
        lines += ["", *_plans(findings)]
    if findings["cost"]:
        lines += ["", *_cost(findings["cost"])]
    return lines


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _agreement(agreement: Mapping[str, Mapping[str, Any]]) -> list[str]:
    widths = list(next(iter(agreement.values())))
    units = next(iter(next(iter(agreement.values())).values()))["units"]
    lines = [
        f"## Predicted and measured divergence of single units ({units} units)",
        "",
        "Spearman's rank correlation with its 95 % interval (units resampled), by width.",
        "",
    ]
    ranks = [[metric, *(_rank(found[width]) for width in widths)] for metric, found in agreement.items()]
    lines += _table(["metric", *(f"{width} bits" for width in widths)], ranks)
    lines += ["", "Predicted over measured: geometric mean (first to third quartile), by width.", ""]
    ratios = [[metric, *(_ratio(found[width]) for width in widths)] for metric, found in agreement.items()]
    return lines + _table(["metric", *(f"{width} bits" for width in widths)], ratios)


def _rank(found: Mapping[str, Any]) -> str:
    if found["spearman"] is None or found["interval"] is None:
        return "-"
    low, high = found["interval"]
    return f"{found['spearman']:.2f} ({low:.2f} to {high:.2f})"


def _ratio(found: Mapping[str, Any]) -> str:
    if found["ratio"] is None:
        return "-"
    low, _, high = found["ratio_quartiles"]
    left_out = f", {found['not_positive']} not positive" if found["not_positive"] else ""
    return f"{found['ratio']:.3g} ({low:.3g} to {high:.3g}{left_out})"


def _plans(findings: Findings) -> list[str]:
    measure = {"kl": "KL", "embedding_error": "relative error"}[findings["measure"]]
    lines = [
        "## Plans of equal bytes",
        "",
        f"{measure} on the held-out rows ± standard error; the difference to the uniform curve at the same bytes "
        "(log-linear between uniform plans) is paired by rows.",
    ]
    header = ["plan", "stored bits", measure, "uniform curve", "difference", "over uniform"]
    for budget, rows in _by_budget(plan_rows(findings)).items():
        lines += ["", f"### {budget:g} bits", "", *_table(header, map(_plan, rows))]
    return lines


def _by_budget(rows: Iterable[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    found: dict[float, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["budget"], row["divergence"])):
        found.setdefault(row["budget"], []).append(row)
    return found


def _plan(row: Mapping[str, Any]) -> list[str]:
    cells = [row["name"], f"{row['bpw']:.4f}", f"{row['divergence']:.4g} ± {row['stderr']:.2g}"]
    if row["uniform"] is None:
        return [*cells, "-", "-", "-"]
    difference = f"{row['minus_uniform']:+.3g} ± {row['minus_uniform_stderr']:.2g}"
    return [*cells, f"{row['uniform']:.4g}", difference, f"{row['divergence'] / row['uniform']:.3f}"]


def _cost(cost: Mapping[str, Mapping[str, Any]]) -> list[str]:
    plain = cost.get(PLAIN)
    header = ["", "seconds", "peak memory, GB", f"times one {PLAIN}"]
    rows = []
    for name, found in cost.items():
        multiple = f"{found['seconds'] / plain['seconds']:.1f}" if plain else "-"
        rows.append([name, f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 1e9:.2f}", multiple])
    return ["## Cost", "", *_table(header, rows)]
