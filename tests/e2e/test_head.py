"""`quantize_lm_head`: the head is measured, allocated, rounded, written and loaded like any other layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hawqtool.errors import UsageError
from hawqtool.export.packed_reader import PackedReader
from hawqtool.pipeline.measure import run_measure
from hawqtool.runtime.reporter import Silent
from tests.support.runs import Run, read, settings
from tests.support.tiny import tiny_llama

TOKENS = torch.arange(3, 35)[None]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(TOKENS).logits


def test_the_head_is_packed_and_loads(place: Path, run: Run) -> None:
    folder, report = run(quantize_lm_head=True, bits="3", target_bpw=3.5)
    head = next(entry for entry in report["plan"] if entry["name"] == "lm_head")
    assert head["bits"] == 3 and report["layers"]["lm_head"]["num_tokens"] == 16 * 32
    config = read(folder / "config.json")["quantization_config"]
    assert config["ignore"] == [] and any("lm_head" in t for t in config["config_groups"]["w3g32"]["targets"])
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16).eval()
    reader = PackedReader(folder)
    with torch.no_grad():
        for entry in report["plan"]:
            name = entry["name"]
            model.get_submodule(name).weight.copy_(reader.tensor(f"{name}.weight"))
        assert torch.equal(logits(folder), model(TOKENS).logits)


def test_its_rounding_counts_in_the_quality(run: Run) -> None:
    plain = run(bits="8", target_bpw=8.5)[1]["evaluation"]["mixed"]["kl"]
    pinned = run(bits="8", target_bpw=8.5, quantize_lm_head=True, pin="lm_head=2")[1]["evaluation"]["mixed"]["kl"]
    assert pinned > 20 * plain


def test_its_target_shifts_towards_the_original(run: Run) -> None:
    shared: dict[str, Any] = {"quantize_lm_head": True, "bits": "3", "target_bpw": 3.5}
    layers = run(target_shift="auto", foem_beta="auto", rounding="foem", **shared)[1]["layers"]
    assert 0 < layers["lm_head"]["target_shift"] <= 1 and layers["lm_head"]["fallback"] is None


def test_its_score_predicts_its_kl(place: Path, run: Run, tmp_path: Path) -> None:
    table = run_measure(settings(place, bits="2,8", quantize_lm_head=True), tmp_path / "s.json", Silent())
    predicted = table["scores"]["kron"]["lm_head"]["w2g32"][0]
    measured = run(bits="8", target_bpw=8.5, quantize_lm_head=True, pin="lm_head=2")[1]["evaluation"]["mixed"]["kl"]
    assert 0.5 < predicted / measured < 2


def test_a_tied_head_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ties the head to the input embedding"):
        run(model=tiny_llama(tmp_path / "tied", tie=True), quantize_lm_head=True, bits="4", target_bpw=4.5)
