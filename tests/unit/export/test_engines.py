"""Which engines load which formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hawqtool.export.engines import (
    CLOSE,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    VLLM_CPU,
    EngineRun,
    engine_runs,
    engines,
    run_note,
)
from hawqtool.formats import QuantFormat, parse_label

ALIGNED = (64, 128)
RUN = EngineRun(VLLM, "0.26.0", "an H200", "2026-11-28", ("fp8-a8f", "nvfp4"), None, 0.002)


def judged(labels: dict[str, str], shape: tuple[int, int] = ALIGNED) -> dict[str, Any]:
    found = engines({name: parse_label(label) for name, label in labels.items()}, dict.fromkeys(labels, shape))
    for entry in found:
        assert set(entry) == {"engine", "minimum_version", "loads", "reason", "tried", "gain"}
        assert entry["minimum_version"] and entry["reason"]
        # No engine is executed by a run, and no sentence may sound as if it were, but of a version that was recorded.
        recorded = "were run in version" in entry["reason"] and entry["engine"] == VLLM
        assert "not run here" in entry["reason"] or entry["engine"] == TRANSFORMERS or recorded
    return {entry["engine"]: entry for entry in found}


def loads(labels: dict[str, str], shape: tuple[int, int] = ALIGNED) -> dict[str, bool]:
    return {engine: entry["loads"] for engine, entry in judged(labels, shape).items()}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", ["g32", "g64", "g128", "ch"])
def test_one_width_everywhere(bits: int, group: str) -> None:
    expected = {TRANSFORMERS: True, VLLM: True, VLLM_CPU: bits == 4, SGLANG: bits in (4, 8)}
    assert loads({"a.0.q_proj": f"w{bits}{group}", "a.0.o_proj": f"w{bits}{group}"}) == expected


def test_mixed_widths_name_what_is_in_the_way() -> None:
    found = judged({"a.0.q_proj": "w4g64", "a.0.o_proj": "w3g64", "a.1.o_proj": "w8g64"})
    assert [found[e]["loads"] for e in (TRANSFORMERS, VLLM, VLLM_CPU, SGLANG)] == [True, True, False, False]
    assert "Marlin" in found[VLLM]["reason"] and "3 bits on Humming" in found[VLLM]["reason"]
    assert "2 of 3 layers at 3, 8 bits" in found[VLLM_CPU]["reason"]
    assert "1 of 3 layers at 3 bits" in found[SGLANG]["reason"]
    assert loads({"a.0.q_proj": "w4g64", "a.0.o_proj": "w8g64"})[SGLANG]


def test_fused_sets_that_differ_load_in_transformers_alone() -> None:
    found = judged({"a.0.q_proj": "w4g64", "a.0.k_proj": "w4g32", "a.0.v_proj": "w4g64", "a.0.o_proj": "w4g64"})
    assert [found[e]["loads"] for e in (TRANSFORMERS, VLLM, VLLM_CPU, SGLANG)] == [True, False, False, False]
    assert "it fuses a.0.qkv_proj, which has formats w4g32, w4g64" in found[VLLM]["reason"]


@pytest.mark.parametrize(
    ("label", "shape", "vllm", "cpu", "sglang"),
    [
        ("w4ch", (64, 72), False, False, False),
        ("w3g32", (72, 64), False, False, False),
        # Marlin fills up odd rows, the CPU kernel does not.
        ("w4g32", (72, 64), True, False, True),
        ("w8g32", (72, 64), True, False, True),
    ],
)
def test_dimensions_that_are_no_multiple_of_32(
    label: str, shape: tuple[int, int], vllm: bool, cpu: bool, sglang: bool
) -> None:
    assert loads({"a": label}, shape) == {TRANSFORMERS: True, VLLM: vllm, VLLM_CPU: cpu, SGLANG: sglang}


def test_zero_points() -> None:
    for bits in (3, 4, 8):
        found = {e["engine"]: e["loads"] for e in engines({"a": QuantFormat(bits, 64, False)}, {"a": ALIGNED})}
        assert found == {TRANSFORMERS: False, VLLM: True, VLLM_CPU: bits == 4, SGLANG: bits == 4}


def expert(block: int, number: int, role: str) -> str:
    return f"model.layers.{block}.mlp.experts.{number}.{role}"


def test_experts_that_differ_between_blocks_are_wrong_in_transformers() -> None:
    labels = {expert(0, 0, "up_proj"): "w4g64", expert(1, 0, "up_proj"): "w8g64"}
    found = judged(labels)
    assert not found[TRANSFORMERS]["loads"] and "w4g64, w8g64" in found[TRANSFORMERS]["reason"]
    assert found[VLLM]["loads"] and found[SGLANG]["loads"]


def test_experts_that_differ_within_a_block() -> None:
    found = judged({expert(0, 0, "up_proj"): "w4g64", expert(0, 1, "up_proj"): "w8g64"})
    assert not found[VLLM]["loads"] and "model.layers.0.mlp.experts" in found[VLLM]["reason"]


def test_odd_widths_of_experts_need_groups() -> None:
    assert not loads({expert(0, 0, "up_proj"): "w3ch"})[VLLM]
    assert loads({expert(0, 0, "up_proj"): "w3g64"})[VLLM]


def test_sglang_knows_experts_by_three_names() -> None:
    assert loads({expert(0, 0, "up_proj"): "w4g64"})[SGLANG]
    assert not loads({expert(0, 0, "w1"): "w4g64"})[SGLANG]


def test_what_an_engine_was_seen_to_serve_is_named() -> None:
    def note(*labels: str, runs: tuple[EngineRun, ...] = (RUN,), cache: str | None = None) -> str | None:
        return run_note(runs, VLLM, {label: parse_label(label) for label in labels}, cache)

    expected = "version 0.26.0 already on an H200 on 2026-11-28, with perplexities within 0.2 % of ours"
    assert "version 0.33.0 on an H200" in str(note("nvfp4", runs=(replace(RUN, version="0.33.0"),)))
    assert expected in str(note("fp8-a8f")) and note("fp8-a8f", "w4g128") is None and note() is None
    other = replace(RUN, labels=("w4g128",), cache="fp8", date="2026-12-01", difference=-0.004)
    assert "2026-12-01, with perplexities within 0.4 %" in str(note("fp8-a8f", "w4g128", runs=(RUN, other)))
    assert note("fp8-a8f", cache="fp8") is None and note("fp8-a8f", cache="fp8", runs=(RUN, other)) is not None
    assert note("fp8-a8f", "w4g128", runs=(RUN, replace(other, card="another"))) is None
    assert note("fp8-a8f", runs=(replace(RUN, difference=0.006),)) is None
    assert all(abs(run.difference) <= CLOSE and all(map(parse_label, run.labels)) for run in engine_runs())
