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
from hawqtool.formats import QuantFormat
from hawqtool.pipeline import report_page
from hawqtool.pipeline.artifacts import SENSITIVITY_SCHEMA
from hawqtool.pipeline.figure_data import figure_data
from hawqtool.pipeline.report_page import run_report

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
    return values


def stored_bytes(bits: int) -> int:
    return QuantFormat(bits, 64).stored_bytes(64, 64, 2)


def a_report(measure: str = "kl", prefix: str = "model.layers", **changes: Any) -> dict[str, Any]:
    names = [f"{prefix}.{block}.{leaf}" for block in range(BLOCKS) for leaf in LEAVES]
    bits = [3, 4] * BLOCKS
    mixed = sum(map(stored_bytes, bits))
    errors = {"output_error": 0.01, "rtn_error": 0.03, "fallback": None}
    rows = {"source": "text.txt", "count": 8, "shape": [64], "fingerprint": "ab" * 32}
    report: dict[str, Any] = {
        "schema": "hawqtool.report/1",
        "model": "tiny",
        "model_revision": None,
        "architecture": "LlamaForCausalLM",
        "hawqtool_version": "0.1.0",
        "command": "hawqtool quantize tiny -o out",
        "config": {"rounding": "gptq", "sensitivity": "auto", "bits": None, "pin": [], "plan": None},
        "sizes": {"original_bytes": 10_000, "quantized_bytes": 4_000, "bpw_linears": BPW, "bpw_file": 6.0},
        "plan": [
            {"name": n, "unit": n, "bits": b, "group_size": 64, "symmetric": True, "bytes": stored_bytes(b)}
            for n, b in zip(names, bits, strict=True)
        ],
        "predicted_loss": 0.5,
        "metric": "kron",
        "engines": [{"engine": "vLLM", "minimum_version": "1", "loads": True, "reason": "by its source"}],
        "layers": {n: errors | {"format": f"w{b}g64"} for n, b in zip(names, bits, strict=True)},
        "rows": {"calibration": rows, "report": rows, "overlap": 0, "report_in_domain": True},
        "evaluation": {
            "measure": measure,
            "original": quality(measure, 0.0),
            "mixed": quality(measure, 0.4, mixed, "w3g64", "w4g64"),
            "uniform": quality(measure, 0.6, 6 * stored_bytes(3), "w3g64"),
            "neighbours": {"above": quality(measure, 0.3, 6 * stored_bytes(4), "w4g64")},
            "uniform_interpolated": {measure: 0.45, "stored_bytes": mixed},
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
    pytest.importorskip("matplotlib")
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


def test_all_parts_are_there(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "out", a_report()))
    assert len(figures_in(text)) == 8
    assert "Left out" not in text
    for part in (
        "mixed (shipped)",
        "uniform, above",
        "-0.2000 ± 0.0200",
        "ab" * 32,
        "10.0 kB → 4.0 kB",
        "0.4000 ± 0.01",
    ):
        assert part in text
    assert "the mixed plan is better than the uniform one" in text


def test_ids_are_unique_and_nothing_is_loaded(tmp_path: Path) -> None:
    elements = _Elements(page_of(written(tmp_path / "out", a_report())))
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
    report["engines"][0] = {"engine": HOSTILE, "minimum_version": HOSTILE, "loads": False, "reason": HOSTILE}
    report["evaluation"]["mixed"]["formats"] = [HOSTILE]
    next(iter(report["layers"].values()))["fallback"] = HOSTILE
    text = page_of(written(tmp_path / "out", report))
    elements = _Elements(text)
    assert not elements.tags & {"script", "img"}
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert "alert(1)" in text and "<script" not in text and "-->" not in text.replace("--&gt;", "")
    assert "\u202e" not in text


@pytest.mark.filterwarnings("error")
def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    report = a_report()
    first, again = (written(tmp_path / name, report) for name in ("a", "b"))
    assert page_of(first) == page_of(again) == page_of(first)


def test_pngs_are_written_beside_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plots = written(tmp_path / "out", a_report()), tmp_path / "plots"
    page, *pngs = run_report(out, plots)
    assert page == out / "report.html" and sorted(pngs) == sorted(plots.iterdir()) and len(pngs) == 8
    before = {png.name: png.read_bytes() for png in pngs}
    assert all(content.startswith(b"\x89PNG") for content in before.values())
    run_report(out, plots)
    assert {png.name: png.read_bytes() for png in pngs} == before


def test_without_scores_the_page_says_what_is_left_out(tmp_path: Path) -> None:
    uniform = quality("kl", 0.6, 6 * stored_bytes(4), "w4g64")
    report = a_report(shipped="uniform", metric=None, predicted_loss=None)
    report["evaluation"] |= {"mixed": uniform, "uniform": uniform, "neighbours": {}, "uniform_interpolated": None}
    text = page_of(written(tmp_path / "out", report, scores=False))
    assert len(figures_in(text)) == 4
    assert "Left out (frontier): reproduce/ has no sensitivity.json" in text
    assert "Left out (sensitivity, roles):" in text
    assert "The plan is uniform" in text


def test_uniform_shipped_instead_of_mixed() -> None:
    report = a_report(shipped="uniform", metric=None, predicted_loss=None)
    figures, _ = figure_data(report, None)
    assert figures["measured"]["shipped"] == "uniform w3g64"
    assert [p["kind"] for p in figures["measured"]["points"]] == ["mixed", "uniform", "uniform", "interpolated"]


def test_predictions_are_those_of_the_scores(tmp_path: Path) -> None:
    report = a_report()
    folder = written(tmp_path / "out", report)
    measured = report_page.read_sensitivity(folder / "reproduce/sensitivity.json")[:2]
    figures, missing = figure_data(report, measured)
    assert not missing
    predicted = {p["label"]: p["predicted"] for p in figures["predicted"]["points"]}
    assert predicted == pytest.approx({"mixed": 0.5, "uniform w3g64": 6 * 0.5 / 27, "uniform w4g64": 6 * 0.5 / 64})
    hull = figures["frontier"]["hull"]
    assert hull[0] == pytest.approx((2.25, 6 * 0.5 / 8)) and hull[-1] == pytest.approx((8.25, 6 * 0.5 / 512))
    assert figures["sensitivity"]["values"] == [0.5 / 8] * 6
    assert figures["roles"]["errors"] == pytest.approx([math.sqrt(3) * 0.1 / 8] * 2)


def test_an_embedding_model_is_judged_by_its_own_measure(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "out", a_report("embedding_error")))
    assert "relative error to the original" in text and "cosine" in text
    assert "KL" not in text and "perplexity" not in text


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
    report["evaluation"]["mixed"] |= {"kl": math.inf, "kl_stderr": math.nan}
    report["evaluation"]["mixed_minus_uniform"] = {"kl": math.nan, "kl_stderr": math.nan}
    report["layers"][report["plan"][0]["name"]]["output_error"] = math.nan
    assert "no difference beyond two standard errors" in page_of(written(tmp_path / "out", report))


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"schema": "hawqtool.report/1"}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, content: str | None) -> None:
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError):
        run_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_place_for_plots_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = written(tmp_path / "out", a_report())
    for plots in (out / "report.json", tmp_path / "a/b"):
        with pytest.raises(UsageError):
            run_report(out, plots)
    assert not (out / "report.html").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "matplotlib_installed", lambda: False)
    with pytest.raises(InputError, match=r"hawqtool\[plot\]"):
        run_report(written(tmp_path / "out", a_report()))
