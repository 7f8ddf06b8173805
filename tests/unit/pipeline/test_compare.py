"""Two results side by side: what differs is said, what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hawqtool.cli.render_compare import print_comparison
from hawqtool.errors import InputError
from hawqtool.pipeline.compare import run_compare

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def written(folder: Path, widths: tuple[int, ...], rows: str = "r", **config: Any) -> Path:
    folder.mkdir()
    quality = {"kl": 0.1 * len(widths), "kl_stderr": 0.01, "num_tokens": 9, "perplexity": 20.0, "same_top": 0.7}
    sizes = {"bpw_linears": 3.25, "quantized_bytes": 100 * sum(widths), "original_bytes": 4000}
    plan = [
        {"name": name, "unit": name, "bits": bits, "group_size": 32, "symmetric": True, "bytes": 64 * bits}
        for name, bits in zip(NAMES, widths, strict=False)
    ]
    report = {
        "schema": "hawqtool.report/2", "model": "m", "model_revision": None, "architecture": "A", "sizes": sizes,
        "plan": plan, "config": {"seed": 0} | config, "rows": {"report": {"fingerprint": rows}}, "shipped": "uniform",
        "evaluation": {"measure": "kl", "uniform": quality | {"formats": ["w3g32"]}, "mixed": None},
        "layers": {entry["name"]: {"output_error": 0.1 / entry["bits"]} for entry in plan}, "timings": {"round": 2.5},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_what_differs_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = written(tmp_path / "a", (2, 4)), written(tmp_path / "b", (3, 4), rows="s", seed=1)
    found = run_compare(first, second / "report.json")
    assert found["settings"] == {"seed": [0, 1]}
    assert found["same_model"] and not found["same_rows"]
    assert found["layers"][0] == {
        "name": NAMES[0], "formats": ["w2g32", "w3g32"], "bytes": [128, 192], "output_error": [0.05, 0.1 / 3],
    }  # fmt: skip
    assert [result["quantized_bytes"] for result in found["results"]] == [600, 700]
    print_comparison(found, every=False)
    shown = capsys.readouterr().out
    assert "up_proj" in shown and "down_proj" not in shown and "+64" in shown and "0.67" in shown
    assert "different report rows" in shown and "1 of 2 layers have the same format" in shown
    print_comparison(found, every=True)
    shown = capsys.readouterr().out
    assert "down_proj" in shown and all(len(line) <= 80 for line in shown.splitlines())


def test_a_layer_of_one_result_alone_has_no_figures_in_the_other(tmp_path: Path) -> None:
    found = run_compare(written(tmp_path / "a", (2,)), written(tmp_path / "b", (2, 4)))
    assert found["layers"][1] == {
        "name": NAMES[1], "formats": [None, "w4g32"], "bytes": [None, 256], "output_error": [None, 0.025],
    }  # fmt: skip


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    good, bare = written(tmp_path / "a", (2,)), tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(InputError, match="has no report.json; expected an output folder"):
        run_compare(good, bare)
    (bare / "report.json").write_text(json.dumps({"schema": "hawqtool.report/2", "plan": []}))
    with pytest.raises(InputError, match="cannot be compared: a report is damaged"):
        run_compare(good, bare)
