"""report.html: nothing of a checkpoint is interpreted, equal records give equal bytes, what is missing is said."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hawqtool.errors import InputError, UsageError
from hawqtool.evaluation.gates import judge
from hawqtool.formats import QuantFormat
from hawqtool.pipeline import report as report_page
from hawqtool.pipeline.report import FiguresAhead, run_report, write_page
from hawqtool.pipeline.run.files import SENSITIVITY_SCHEMA
from hawqtool.records import Score
from hawqtool.report.page import drawing_processes
from hawqtool.report.page.drawing_processes import figure_svg
from hawqtool.report.page.figure_data import FIGURE_NAMES, figure_data
from hawqtool.report.page.figures import FIGURES, TITLES
from hawqtool.report.wording import shown_metric

HOSTILE = (
    "</svg></title><script>alert(1)</script><img src=x onerror=alert(2)> & \"'$\\frac{$ --> ]]> {{x}} \u202e\u4e2d"
)
LEAVES = ("self_attn.q_proj", "mlp.down_proj")
BLOCKS, BPW = 3, 3.5
WEIGHTS = 64 * 64
VOID = {"meta", "img", "br", "link"}


def quality(measure: str, value: float, stored: int | None = None, *formats: str) -> dict[str, Any]:
    values: dict[str, Any] = {measure: value, f"{measure}_stderr": 0.01, "num_tokens": 512}
    values |= {"perplexity": 20.0, "same_top": 0.7} if measure == "kl" else {"cosine": 0.99}
    if stored is not None:
        bpw = 8 * stored / (WEIGHTS * BLOCKS * len(LEAVES))
        values |= {"formats": list(formats), "stored_bytes": stored, "bpw_linears": bpw, "total_bytes": stored + 100}
        values |= {"selection": quality(measure, value + 0.05), "predicted": {}}
    return values


def tried(measure: str, value: float, stored: int, predicted: float, *formats: str) -> dict[str, Any]:
    differences = {role: {measure: value - 0.6, f"{measure}_stderr": 0.02} for role in ("selection", "report")}
    record = quality(measure, value, stored, *formats)
    return record | {"minus_uniform": differences, "predicted": {"kron": predicted}, "predicted_loss": predicted}


def uniform(bits: int, value: float, measure: str = "kl") -> dict[str, Any]:
    record = quality(measure, value, 6 * stored_bytes(bits), f"w{bits}g64")
    return record | {"predicted": {"kron": 6 * 0.5 / bits**3}}


def a_search() -> dict[str, Any]:
    """Report values of a run with a bound of 0.35 that 4 bits meet."""
    found = ((3, 0.6, 0.5), (4, 0.3, 0.2), (8, 0.1, 0.1))
    trials = [
        {
            "stored_bytes": 6 * stored_bytes(bits),
            "bpw_linears": bits + 0.25,
            "divergence": {"selection": selection, "report": report},
        }
        for bits, selection, report in found
    ]
    search = {"bound": 0.35, "met": True, "trials": trials[::-1], "largest_that_misses": trials[0]}
    gate = judge("target_kl", 0.35, 0.3)
    return {"search": search, "gates": [gate]}


def stored_bytes(bits: int) -> int:
    return QuantFormat(bits, 64).stored_bytes(64, 64, 2)


def a_report(measure: str = "kl", prefix: str = "model.layers", **changes: Any) -> dict[str, Any]:
    names = [f"{prefix}.{block}.{leaf}" for block in range(BLOCKS) for leaf in LEAVES]
    bits = [3, 4] * BLOCKS
    mixed = sum(map(stored_bytes, bits))
    errors = {"output_error": 0.01, "rtn_error": 0.03, "fallback": None}
    rows = {"source": "text.txt", "count": 8, "kind": "tokens", "shape": [64], "fingerprint": "ab" * 32}
    report: dict[str, Any] = {
        "schema": "hawqtool.report/2",
        "model": "tiny",
        "model_revision": None,
        "source_format": None,
        "architecture": "LlamaForCausalLM",
        "hawqtool_version": "0.1.0",
        "command": "hawqtool quantize tiny -o out",
        "config": {"rounding": "gptq", "sensitivity": "auto", "bits": None, "pin": [], "plan": None},
        "sizes": {"original_bytes": 10_000, "quantized_bytes": 4_000, "bpw_linears": BPW, "bpw_file": 6.0},
        "kept": {"bytes": 0, "share": 0.0, "rows": []},
        "plan": [
            {"name": n, "unit": n, "bits": b, "group_size": 64, "symmetric": True, "bytes": stored_bytes(b)}
            for n, b in zip(names, bits, strict=True)
        ],
        "predicted_loss": 0.5,
        "metric": "kron",
        "search": None,
        "gates": [],
        "engines": [
            {"engine": "vLLM", "minimum_version": "1", "loads": True, "reason": "by its source", "tried": False}
        ],
        "layers": {n: errors | {"format": f"w{b}g64"} for n, b in zip(names, bits, strict=True)},
        "rows": dict.fromkeys(("calibration", "scoring", "selection", "report"), rows)
        | {"overlap": 0, "report_in_domain": True},
        "evaluation": {
            "measure": measure,
            "original": quality(measure, 0.0),
            "tried": {
                "kron": tried(measure, 0.4, mixed, 0.5, "w3g64", "w4g64"),
                "width swap 1": tried(measure, 0.45, mixed, 0.55, "w3g64", "w4g64"),
            },
            "mixed": tried(measure, 0.4, mixed, 0.5, "w3g64", "w4g64") | {"chosen_by": "kron"},
            "uniform": uniform(3, 0.6, measure),
            "mixed_minus_uniform": {measure: -0.2, f"{measure}_stderr": 0.02},
        },
        "shipped": "mixed",
        "timings": {"rows": 0.1, "round_mixed": 2.0},
        "peak_memory_bytes": {"host": 1_000_000},
        "device": "cpu",
        "warnings": [],
    }
    return report | changes


def a_sensitivity(report: dict[str, Any]) -> dict[str, Any]:
    names = [entry["name"] for entry in report["plan"]]
    member = {"out_features": 64, "in_features": 64, "block": 0, "scale_bytes": 2}
    # A standard error that is not known is null.
    scores = {f"w{b}g64": [0.5 / b**3, None if b == 4 else 0.1 / b**3] for b in (2, 3, 4, 8)}
    return {
        "schema": SENSITIVITY_SCHEMA,
        "model": "tiny",
        "model_fingerprint": "f",
        "rounding": "gptq",
        "settings": {},
        "rows": {},
        "unquantized_bytes": 100,
        "units": {name: [member | {"name": name, "unit": name}] for name in names},
        "scores": {"kron": dict.fromkeys(names, scores)},
    }


def written(folder: Path, report: dict[str, Any], scores: bool = True) -> Path:
    (folder / "reproduce").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "reproduce/packages.json").write_text(json.dumps({"torch": "2.13", "<b>": HOSTILE}))
    if scores:
        (folder / "reproduce/sensitivity.json").write_text(json.dumps(a_sensitivity(report)))
    return folder


def page_of(folder: Path) -> str:
    return run_report(folder)[0].read_text(encoding="utf-8")


class _Elements(HTMLParser):
    """Collects elements and attributes, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def figures_in(text: str) -> list[str]:
    return re.findall(r'<svg[^>]* aria-label="([^"]+)"', text)


@pytest.fixture(scope="module")
def usual_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of `a_report`; drawing one takes a second."""
    return page_of(written(tmp_path_factory.mktemp("page") / "out", a_report()))


def test_all_parts_are_there(usual_page: str) -> None:
    text = usual_page
    assert len(figures_in(text)) == 8
    assert "Left out" not in text
    for part in (
        "mixed (shipped)",
        "-0.2000 ± 0.0200",
        "ab" * 32,
        "10.0 kB → 4.0 kB",
        "0.4000 ± 0.01",
    ):
        assert part in text
    assert "the mixed plan is better than the uniform one" in text


def test_ids_are_unique_and_nothing_is_loaded(usual_page: str) -> None:
    elements = _Elements(usual_page)
    ids = [value for name, value in elements.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {str(value) for name, value in elements.attributes if name in ("href", "xlink:href", "src")}
    assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)
    assert not elements.tags & {"script", "link", "iframe", "img", "object", "image", "metadata"}


def test_hostile_names_are_shown_and_never_interpreted(tmp_path: Path) -> None:
    report = a_report(
        prefix=f"{HOSTILE}.layers", model=HOSTILE, architecture=HOSTILE, command=HOSTILE, warnings=[HOSTILE]
    )
    report |= {"device": HOSTILE, "hawqtool_version": HOSTILE, "model_revision": HOSTILE, "timings": {HOSTILE: 1.0}}
    report["config"]["rounding"] = HOSTILE
    report["rows"]["report"] = report["rows"]["report"] | {"source": HOSTILE, "fingerprint": HOSTILE}
    report["engines"][0] = {
        "engine": HOSTILE,
        "minimum_version": HOSTILE,
        "loads": False,
        "reason": HOSTILE,
        "tried": True,
    }
    report["evaluation"]["mixed"]["formats"] = [HOSTILE]
    report["evaluation"]["uniform"]["formats"] = [HOSTILE]
    report["evaluation"]["tried"][HOSTILE] = report["evaluation"]["tried"]["kron"]
    next(iter(report["layers"].values()))["fallback"] = HOSTILE
    text = page_of(written(tmp_path / "out", report))
    elements = _Elements(text)
    assert not elements.tags & {"script", "img"}
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert "alert(1)" in text and "<script" not in text and "-->" not in text.replace("--&gt;", "")
    assert "\u202e" not in text


@pytest.mark.filterwarnings("error")
def test_equal_records_give_equal_bytes(usual_page: str, tmp_path: Path) -> None:
    assert page_of(written(tmp_path / "out", a_report())) == usual_page


def test_every_figure_has_a_place_and_a_title() -> None:
    assert set(FIGURE_NAMES) == set(FIGURES) == set(TITLES)


def test_figures_that_processes_drew_are_taken_where_nothing_changed(
    usual_page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a process that ended are drawn here."""
    report, drawn = a_report(), list[str]()
    out = written(tmp_path / "out", report | {"timings": {"rows": 1.0}})
    monkeypatch.setattr(report_page, "figure_svg", lambda *figure: drawn.append(figure[0]) or figure_svg(*figure))
    monkeypatch.setattr(drawing_processes.os, "cpu_count", lambda: 8)
    with drawing_processes.DrawingProcesses() as processes:
        figures = FiguresAhead(processes)
        figures.begin(out, report | {"timings": {"rows": 1.0}})
        assert not figures.finish()  # nobody draws
        processes.start()
        figures.begin(out, report | {"timings": {"rows": 1.0}})
        children = list(processes._children)
        early = dict(figures.finish())
        children[0].kill()
        children[0].wait()
        figures.begin(out, report)
        (out / "report.json").write_text(json.dumps(report))
        write_page(out, figures.finish())
    assert len(children) == 2 and all(child.returncode is not None for child in children)
    assert len(early) == 8 and drawn == ["timings"]
    assert (out / "report.html").read_text(encoding="utf-8") == usual_page


def test_pngs_are_written_beside_the_page(tmp_path: Path) -> None:
    out, plots = written(tmp_path / "out", a_report()), tmp_path / "plots"
    page, *pngs = run_report(out, plots)
    assert page == out / "report.html" and sorted(pngs) == sorted(plots.iterdir()) and len(pngs) == 8
    before = {png.name: png.read_bytes() for png in pngs}
    assert all(content.startswith(b"\x89PNG") for content in before.values())
    run_report(out, plots)
    assert {png.name: png.read_bytes() for png in pngs} == before


def test_without_scores_the_page_says_what_is_left_out(tmp_path: Path) -> None:
    alone = uniform(4, 0.6) | {"predicted": {}}
    report = a_report(shipped="uniform", metric=None, predicted_loss=None)
    tried = {"uniform menu": alone | {"minus_uniform": {}, "predicted_loss": None}}
    report["evaluation"] |= {"mixed": alone | {"chosen_by": "uniform menu"}, "uniform": alone, "tried": tried}
    text = page_of(written(tmp_path / "out", report, scores=False))
    assert len(figures_in(text)) == 4
    assert "Left out (frontier): reproduce/ has no sensitivity.json" in text
    assert "Left out (sensitivity, roles):" in text
    assert "The plan is uniform" in text


def test_uniform_shipped_instead_of_mixed() -> None:
    report = a_report(shipped="uniform", metric=None, predicted_loss=None)
    figures, _ = figure_data(report, None)
    points = figures["measured"]["points"]
    assert [p["label"] for p in points if p["shipped"]] == ["uniform w3g64"]
    assert [p["kind"] for p in points] == ["mixed", "mixed", "uniform"]


def test_predictions_are_those_of_the_scores(tmp_path: Path) -> None:
    report = a_report()
    folder = written(tmp_path / "out", report)
    measured = report_page.read_sensitivity(folder / "reproduce/sensitivity.json")[:2]
    figures, missing = figure_data(report, measured)
    assert not missing
    predicted = {p["label"]: p["predicted"] for p in figures["predicted"]["points"]}
    uniform_sum = {"uniform w3g64": 6 * 0.5 / 27}
    assert predicted == pytest.approx({"1 kron": 0.5, "2 width swap 1": 0.55} | uniform_sum)
    assert [plan["mark"] for plan in figures["frontier"]["plans"]] == ["1", "2", "w3g64"]
    hull = figures["frontier"]["hull"]
    assert hull[0] == pytest.approx((2.25, 6 * 0.5 / 8)) and hull[-1] == pytest.approx((8.25, 6 * 0.5 / 512))
    assert figures["sensitivity"]["values"] == [0.5 / 8] * 6
    assert figures["roles"]["errors"] == pytest.approx([math.sqrt(3) * 0.1 / 8] * 2)


def test_an_embedding_model_is_judged_by_its_own_measure(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "out", a_report("embedding_error")))
    assert "relative error to the original" in text and "cosine" in text
    assert "KL" not in text and "perplexity" not in text


def test_every_plan_that_was_tried_is_in_the_table(usual_page: str) -> None:
    text = usual_page
    table = text[text.index("Plans that were tried") : text.index("Size against loss")]
    assert "<td>1</td><td" in table and "kron (shipped)" in table and "width swap 1" in table
    assert "predicted (kron)" in table and "0.5500" in table
    # Selection rows, report rows, and the paired difference on each.
    assert "0.5000 ± 0.0100" in table and "0.4500 ± 0.0100" in table and table.count("-0.1500 ± 0.0200") == 2
    assert table.count("uniform w3g64") == 1


def test_rounds_of_swaps_by_gradient_have_their_table(usual_page: str, tmp_path: Path) -> None:
    report = a_report()
    attempt = {"round": 1, "share": 0.05, "moves": 7, "stored_bytes": 8, "predicted": -0.5, "predicted_stderr": 0.25}
    attempts = [
        {**attempt, "measured": value, "measured_stderr": 0.125, "accepted": value < 0} for value in (0.5, -1.0)
    ]
    assert "Swaps by gradient" not in usual_page
    report["evaluation"]["swaps"] = attempts
    text = page_of(written(tmp_path / "out", report))
    table = text[text.index("Swaps by gradient") :]
    assert "5 %" in table and "-0.5000 ± 0.2500" in table and "-1.0000 ± 0.1250" in table
    assert table[: table.index("</table>")].count("taken") == 1


def test_a_plan_of_swaps_is_shown_with_the_scores_of_the_run() -> None:
    report = a_report(metric="width swap")
    report["evaluation"]["mixed"]["chosen_by"] = "width swap 1"
    figures, _ = figure_data(report, None)
    assert [p["label"] for p in figures["measured"]["points"] if p["shipped"]] == ["2 width swap 1"]
    assert shown_metric(report) == "kron"


def test_a_search_has_its_figure_and_table(usual_page: str, tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "out", a_report(**a_search())))
    assert len(figures_in(text)) == 9
    section = text[text.index("Search for the smallest plan") : text.index("Bits by layer")]
    rows = re.findall(r"<tr[^>]*><td.*", section)
    assert ["meets it" in row for row in rows] == [False, True, True]
    assert rows[1].startswith('<tr class="chosen">') and "0.3000" in rows[1]
    assert "Search for" not in usual_page


def test_attempts_of_a_search_stand_in_predicted_against_measured(tmp_path: Path) -> None:
    report = a_report(**a_search())
    folder = written(tmp_path / "out", report)
    figures, _ = figure_data(report, report_page.read_sensitivity(folder / "reproduce/sensitivity.json")[:2])
    assert figures["search"]["bpw"] == [3.25, 4.25, 8.25]
    assert figures["search"]["series"] == {"selection": [0.6, 0.3, 0.1], "report": [0.5, 0.2, 0.1]}
    searched = [p for p in figures["predicted"]["points"] if p["kind"] == "searched"]
    # The other one is the uniform plan, which is a point already.
    assert [p["value"] for p in searched] == [0.1, 0.2]
    assert searched[0]["predicted"] == pytest.approx(6 * 0.5 / 512)


@pytest.mark.parametrize("passed", [True, False])
def test_gates_pass_or_fail(tmp_path: Path, passed: bool) -> None:
    gate = judge("target_kl", 0.35, 0.3 if passed else 0.4)
    text = page_of(written(tmp_path / "out", a_report(gates=[gate])))
    assert "Gates" in text and ("FAILED" in text) == (not passed) and ("1 of 1 failed" in text) == (not passed)


def test_negative_scores_are_shown(tmp_path: Path) -> None:
    from hawqtool.report.page.figures import bars, frontier, predicted_measured

    report = a_report()
    folder = written(tmp_path / "out", report)
    table, units, *_ = report_page.read_sensitivity(folder / "reproduce/sensitivity.json")
    first = units[0].name
    table.scores["kron"][first] = {fmt: Score(-9.0, 1.0) for fmt in table.scores["kron"][first]}
    report["evaluation"]["tried"]["width swap 1"]["predicted"]["kron"] = -8.5
    figures, missing = figure_data(report, (table, units))
    assert not missing
    assert figures["sensitivity"]["values"][-1] == -9.0
    assert "1 of all have a negative score" in figures["sensitivity"]["title"]
    axes = bars(figures["sensitivity"]).axes[0]
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] < -10.0
    for figure in (frontier(figures["frontier"]), predicted_measured(figures["predicted"])):
        axes = figure.axes[0]
        assert axes.get_yscale() == "symlog"
        axes.figure.draw_without_rendering()
        low, high = axes.get_ylim()
        drawn = [y for line in axes.lines for y in line.get_ydata() if math.isfinite(y)]
        assert low <= min(drawn) < 0 or axes.get_xlim()[0] < 0
        assert max(drawn) <= high


def test_labels_of_crowded_points_do_not_overlap() -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from hawqtool.report.page.drawing import label_apart

    figure = Figure()
    axes = figure.subplots()
    places = [(0.5 + 0.005 * i, 0.5, str(i)) for i in range(8)]
    axes.plot([x for x, _, _ in places], [y for _, y, _ in places], "o")
    axes.set_xlim(0, 1)
    label_apart(figure, axes, places)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert [text.get_text() for text in axes.texts] == [text for _, _, text in places]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_stacks_and_experts_have_places() -> None:
    report = a_report()
    names = ["text.layers.0.mlp.experts.0.w1", "text.layers.0.mlp.experts.1.w1", "vision.layers.0.fc", "lm_head"]
    entry = report["plan"][0]
    report["plan"] = [entry | {"name": n, "unit": n, "bits": b} for n, b in zip(names, (2, 4, 3, 8), strict=True)]
    errors = {"rtn_error": 0.1, "format": "w4g64", "fallback": None}
    report["layers"] = {n: errors | {"output_error": 0.01 * (i + 1)} for i, n in enumerate(names)}
    figures, _ = figure_data(report, None)
    assert figures["bits"]["blocks"] == ["0", "–"]
    assert figures["bits"]["cells"]["text.layers · mlp.experts.*.w1", "0"] == [2, 4]
    assert figures["layers"]["roles"]["text.layers · mlp.experts.*.w1"] == [[0, pytest.approx(0.015), 0.1]]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    report = a_report()
    for record in (report["evaluation"]["mixed"], report["evaluation"]["tried"]["kron"]):
        record |= {"kl": math.inf, "kl_stderr": math.nan}
    report["evaluation"]["mixed_minus_uniform"] = {"kl": math.nan, "kl_stderr": math.nan}
    report["layers"][report["plan"][0]["name"]]["output_error"] = math.nan
    assert "no difference beyond two standard errors" in page_of(written(tmp_path / "out", report))


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"schema": "hawqtool.report/2"}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError):
        run_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_place_for_plots_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    out = written(tmp_path / "out", a_report())
    for plots in (out / "report.json", tmp_path / "a/b"):
        with pytest.raises(UsageError):
            run_report(out, plots)
    assert not (out / "report.html").exists()
