"""The page ``report.html``: figures and tables in one file that loads nothing else and runs no script."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from hawqtool.report.escape import one_line
from hawqtool.report.page.html_tables import (
    engines_table,
    formats_table,
    gates_table,
    kept_table,
    quality_table,
    rows_table,
    search_table,
    swaps_table,
    tried_table,
    verdict,
    versions_table,
    worst_table,
)
from hawqtool.report.plan_comparison import PlanComparison
from hawqtool.report.schema import Gate, Report, shipped_plan
from hawqtool.report.wording import (
    EXPLANATIONS,
    MEASURES,
    NOT_EVALUATED,
    cache_text,
    cost_text,
    effort_text,
    measurement_text,
    not_rounded_lines,
    plus_minus,
    size,
)

_SEARCH = "Search for the smallest plan"
SECTIONS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Size against loss",
        "Left and down is better. A uniform plan gives all layers one width; a mixed plan gives each unit its own.",
        (
            (
                "frontier",
                "Predicted: the sum of the units' scores. The line has the least that any plan of a size reaches; "
                "square marks are uniform plans whose formats were measured, numbers are those of the plans that were "
                "tried.",
            ),
            (
                "measured",
                "Measured: plans that were rounded, written and run on rows that chose nothing. Bars are one standard "
                "error over rows; as all plans ran on the same rows, differences are surer than the bars suggest. "
                "Points of nearly the same size are set side by side.",
            ),
        ),
    ),
    (
        _SEARCH,
        "Plans of the frontier were rounded and measured until the smallest was found whose divergence is within the "
        "bound on the selection rows. The report rows chose nothing.",
        (("search", ""),),
    ),
    (
        "Bits by layer",
        "",
        (("bits", "Roles in the order in which a block calls them. A range means that layers of a cell differ."),),
    ),
    (
        "Sensitivity",
        "",
        (
            (
                "sensitivity",
                "The units of the largest scores by magnitude, as block · role. Lines are one standard error. A score "
                "below zero predicts that rounding the unit lowers the loss, or is noise of the estimate.",
            ),
            (
                "roles",
                "The same scores, summed over the units of a role (their number in brackets). Standard errors are "
                "added as if units were independent.",
            ),
        ),
    ),
    (
        "Predicted against measured",
        "",
        (
            (
                "predicted",
                "Every plan that was rounded and has a prediction. On the dashed line a prediction is exact. What "
                "allocation needs is the order of plans, which is right where the points rise.",
            ),
        ),
    ),
    (
        "Error of each layer",
        "",
        (
            (
                "layers",
                "Squared output error over squared output, on the calibration rows, beside plain rounding on the same "
                "scales. Jumps along a line come from widths that change from block to block; experts are averaged.",
            ),
        ),
    ),
    ("Time", "", (("timings", ""),)),
)
"""Heading, introduction, and the figures (name and caption) of each part."""

_STYLE = """\
:root{color-scheme:light dark;--ink:#1b1f24;--muted:#5b6470;--line:#d9dde3;--page:#ffffff;--box:#f5f6f8;--warn:#8a4b00}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--muted:#a3adb8;--line:#3a424c;--page:#14171b;--box:#1d2127;\
--warn:#f0b35a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:1.2rem 1rem 3rem;background:var(--page);color:var(--ink);\
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .4rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p,figcaption{max-width:46rem;margin:.4rem 0}
figcaption,.note{color:var(--muted);font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1rem 0}
.tile{background:var(--box);border-radius:8px;padding:.6rem .8rem;min-width:0}
.tile b{display:block;font-size:1.25rem;line-height:1.3;overflow-wrap:anywhere}
.tile span{color:var(--muted);font-size:.85rem}
.warnings{border-left:4px solid var(--warn);background:var(--box);padding:.5rem .9rem;border-radius:4px;margin:1rem 0}
.warnings b{color:var(--warn)}
.warnings ul{margin:.2rem 0;padding-left:1.2rem}
.failed{color:var(--warn);font-weight:600}
li{overflow-wrap:anywhere}
figure{margin:1.2rem 0}
.scroll{overflow-x:auto;max-width:100%}
.scroll svg{display:block;height:auto;max-width:none}
.scroll svg *{stroke-linejoin:round;stroke-linecap:butt}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top;\
white-space:nowrap}
th{color:var(--muted);font-weight:600;white-space:normal;vertical-align:bottom}
.n{text-align:right}
tr.chosen td{font-weight:600}
td.name{min-width:8rem;white-space:normal}
td.text{min-width:18rem;white-space:normal}
code,pre{font:.85rem/1.45 ui-monospace,monospace}
pre{background:var(--box);padding:.7rem .9rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere}"""


def page(report: Report, figures: Mapping[str, str], missing: Mapping[str, str], versions: Mapping[str, Any]) -> str:
    """Text of the page; equal arguments give equal text.

    Args:
        report: Of schema ``hawqtool.report/2``. Names, paths and commands in it are shown, never interpreted.
        figures: Name to SVG element, safe already.
        missing: Name to the reason why a figure is left out.
        versions: Package to version.
    """
    title = f"{_text(report['model'])}, {report['sizes']['bpw_linears']:.2f} bits per weight"
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # Nothing is fetched or executed, whatever a name in the report holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
    )
    parts = [_header(report, title), _quality(report)]
    known = figures.keys() | missing.keys()
    # What this run did not do has no section.
    for heading, said, content in SECTIONS:
        introduction = (effort_text(report) or "").capitalize() if heading == "Time" else said
        if any(name in known for name, _ in content):
            parts.append(_section(heading, introduction, content, figures, missing))
            if heading == _SEARCH and report["search"] is not None and report["evaluation"] is not None:
                parts.append(search_table(report["search"], report["evaluation"]["measure"]))
    parts.append(_tables(report, versions))
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _text(value: object, longest: int = 300) -> str:
    return html.escape(one_line(value, longest))


def _header(report: Report, title: str) -> str:
    sizes, shipped = report["sizes"], report["shipped"]
    before, after = sizes["original_bytes"], sizes["quantized_bytes"]
    widths = sorted({entry["bits"] for entry in report["plan"]})
    kind = f"uniform, {widths[0]} bit" if len(widths) == 1 else f"{shipped}, {', '.join(map(str, widths))} bit"
    tiles = {
        f"weight files, {100 * after / before:.1f} % of the original": f"{size(before)} → {size(after)}",
        "stored bits per weight, quantized linears": f"{sizes['bpw_linears']:.3f}",
        "stored bits per weight, whole files": f"{sizes['bpw_file']:.3f}",
        "shipped plan": kind,
        **_divergence_tile(report),
        **({} if (found := report.get("verdict")) is None else {"verdict": found["grade"]}),
        **{f"gate {gate['name']}": "passed" if gate["passed"] else "FAILED" for gate in report["gates"]},
        "peak memory": ", ".join(f"{size(v)} {k}" for k, v in report["peak_memory_bytes"].items()),
    }
    boxes = "\n".join(f'<div class="tile"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for k, v in tiles.items())
    about = (
        f"{_text(report['architecture'])}, rounded with {_text(report['config']['rounding'])} by hawqtool "
        f"{_text(report['hawqtool_version'])} on {_text(report['device'])}"
    )
    if scores := measurement_text(report):
        about += f", {_text(scores)}"
    if report["model_revision"]:
        about += f", commit {_text(report['model_revision'])}"
    return f'<h1>{title}</h1>\n<p class="note">{about}.</p>\n<div class="tiles">\n{boxes}\n</div>\n{_warnings(report)}'


def _divergence_tile(report: Report) -> dict[str, str]:
    evaluation, chosen = report["evaluation"], shipped_plan(report)
    if evaluation is None or chosen is None:
        return {"quality": "not evaluated"}
    measure = evaluation["measure"]
    return {f"{MEASURES[measure]} to the original": f"{chosen[measure]:.4f}{plus_minus(chosen, measure)}"}


def _warnings(report: Report) -> str:
    found = [f"<li>{_text(warning, 1000)}</li>" for warning in report["warnings"]]
    if not found:
        return '<p class="note">The run had no warnings.</p>'
    heading = "1 warning" if len(found) == 1 else f"{len(found)} warnings"
    return f'<div class="warnings"><b>{heading}</b>\n<ul>\n' + "\n".join(found) + "\n</ul></div>"


def _quality(report: Report) -> str:
    rows, evaluation = report["rows"]["report"], report["evaluation"]
    if evaluation is None or rows is None:
        return f"<h2>Quality</h2>\n<p>{_text(NOT_EVALUATED)}</p>\n{_gates(report['gates'])}"
    domain = " They come from the calibration source (in-domain), which flatters." * report["rows"]["report_in_domain"]
    judged = " ".join([verdict(evaluation), *(f"{line}." for line in not_rounded_lines(evaluation))])
    return (
        f"<h2>Quality</h2>\n<p>{_text(judged)}</p>\n{quality_table(report, evaluation)}\n"
        f'<p class="note">{_text(EXPLANATIONS[evaluation["measure"]])} Rows: {_text(rows["source"])}, which '
        f"neither calibrated nor chose anything.{domain}</p>\n{_cache(report)}{_gates(report['gates'])}"
        f"<h3>Plans that were tried</h3>\n{tried_table(report, evaluation['measure'])}\n"
        '<p class="note">Numbers are those in the figures. The selection rows choose: among the mixed plans the lowest '
        "value, and against the best uniform plan that fits a paired t-test that knows how many were tried. The "
        f"report rows choose nothing.</p>{_swaps(evaluation)}"
    )


def _cache(report: Report) -> str:
    notes = {"KV cache": cache_text(report), "Second budget": cost_text(report)}
    return "".join(f'<p class="note">{name}: {_text(found)}.</p>\n' for name, found in notes.items() if found)


def _swaps(evaluation: PlanComparison) -> str:
    """The rounds of swaps by gradient, where there were any."""
    attempts = evaluation.get("swaps")
    if not attempts:
        return ""
    return (
        f"\n<h3>Swaps by gradient</h3>\n{swaps_table(attempts)}\n"
        '<p class="note">Changes of the divergence from the plan that the round began at, of the model put together of '
        "roundings that lay ready. Plans of one round come from one gradient.</p>"
    )


def _gates(gates: list[Gate]) -> str:
    if not gates:
        return ""
    failed = sum(not gate["passed"] for gate in gates)
    said = f'<p class="failed">{failed} of {len(gates)} failed.</p>\n' if failed else ""
    return f"<h3>Gates</h3>\n{said}{gates_table(gates)}\n"


def _section(
    heading: str,
    introduction: str,
    content: tuple[tuple[str, str], ...],
    figures: Mapping[str, str],
    missing: Mapping[str, str],
) -> str:
    parts = [f"<h2>{heading}</h2>"] + [f"<p>{introduction}</p>"] * bool(introduction)
    reasons = dict.fromkeys(missing[name] for name, _ in content if name in missing)
    for name, caption in content:
        if name in figures:
            below = f"\n<figcaption>{caption}</figcaption>" if caption else ""
            # Focusable, so that the keyboard can scroll it too.
            parts.append(f'<figure><div class="scroll" tabindex="0">{figures[name]}</div>{below}</figure>')
    for reason in reasons:
        what = ", ".join(name for name, _ in content if missing.get(name) == reason)
        parts.append(f'<p class="note">Left out ({what}): {_text(reason, 1000)}</p>')
    return "\n".join(parts)


def _tables(report: Report, versions: Mapping[str, Any]) -> str:
    overlap = report["rows"]["overlap"]
    return "\n".join(
        (
            "<h2>Tables</h2>",
            f"<h3>Formats of the shipped plan</h3>\n{formats_table(report)}",
            f"<h3>Kept as it is</h3>\n{kept_table(report['kept'])}",
            f"<h3>Layers with the largest error</h3>\n{worst_table(report)}",
            f"<h3>Loads in</h3>\n{engines_table(report)}",
            f'<h3>Rows</h3>\n{rows_table(report)}\n<p class="note">Rows in more than one set: {_text(overlap)}.</p>',
            f"<h3>Command</h3>\n<pre>{_text(report['command'], 10_000)}</pre>",
            f"<h3>Versions</h3>\n{versions_table(versions)}",
        )
    )
