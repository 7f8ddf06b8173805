"""One width alone as a target, runs without an evaluation, and runs without any data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hawqtool.export.manifest import weight_hashes
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.formats import parse_label
from hawqtool.pipeline.report import write_page
from hawqtool.rounding.grid import search_scales
from tests.support.runs import MIXED_TARGET, Run, read

BARE: dict[str, Any] = {"calibration": "self", "num_samples": None, "seq_len": None, "eval_samples": None}
"""Settings that name no data."""


def test_one_width_alone_is_the_uniform_plan_of_its_budget(place: Path, run: Run) -> None:
    folder, report = run(bits="4")
    targeted, _ = run(bits="4", target_bpw=4.5)
    assert weight_hashes(folder) == weight_hashes(targeted)
    assert report["shipped"] == "uniform"
    # Nothing is scored and nothing chosen, so no rows are spent on it.
    assert report["rows"]["scoring"] is None and report["rows"]["selection"] is None
    assert report["rows"]["report"]["count"] == 8
    assert verify_folder(folder, place / "model").problems == ()


def test_one_width_with_a_pin_has_no_rival(run: Run) -> None:
    _, report = run(bits="4", pin="re:.*down_proj=8")
    assert report["shipped"] == "mixed" and report["evaluation"]["uniform"] is None


def test_plain_rounding_to_one_width_reads_no_data(place: Path, run: Run) -> None:
    folder, report = run(bits="4", rounding="rtn", profile="portable", **BARE)
    assert report["evaluation"] is None and report["config"]["eval"] is False
    assert {report["rows"][role] for role in ("calibration", "scoring", "selection", "report")} == {None}
    assert verify_folder(folder, place / "model").problems == ()
    stored, packed = load_file(place / "model/model.safetensors"), PackedReader(folder)
    for name, layer in report["layers"].items():
        weight = stored[f"{name}.weight"].double()
        fmt = parse_label(layer["format"])
        scales = search_scales(weight.float(), torch.ones(weight.shape[1]), fmt, torch.bfloat16, both_signs=False)
        steps = scales.double().repeat_interleave(fmt.group_size, 1)
        exact = (weight / steps).round().clamp(fmt.min_code, fmt.max_code) * steps
        nearest = exact.bfloat16().double()  # engines unpack into the stored dtype
        found = packed.tensor(f"{name}.weight").double()
        assert torch.equal(found, nearest), name
        error = float((nearest - weight).square().sum() / weight.square().sum())
        assert layer["weight_error"] == pytest.approx(error, rel=1e-5) and layer["output_error"] is None
    write_page(folder)
    for file in ("README.md", "report.html"):
        assert "Not evaluated" in (folder / file).read_text(), file
    assert "no data was read" in (folder / "README.md").read_text()


def test_without_evaluation_the_plan_of_the_metric_is_shipped(run: Run) -> None:
    settings = {"bits": "2,3,4,8", "target_bpw": MIXED_TARGET}
    folder, report = run(**settings, eval=False, eval_samples=None)
    _, judged = run(**settings, shortlist=1)
    stored = sum(layer["bytes"] for layer in read(folder / "reproduce/plan.json")["layers"])
    assert stored == judged["evaluation"]["tried"]["projection"]["stored_bytes"]
    assert report["evaluation"] is None and report["metric"] == "projection"
    assert report["rows"]["report"] is None and report["rows"]["calibration"]["count"] == 16
