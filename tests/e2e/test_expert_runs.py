"""What a run says of experts that its calibration rows hardly reach: nothing is filled up silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.cli.render import print_report
from hawqtool.config import RunConfig
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.stages.report import routed_tokens, routing_warnings
from hawqtool.runtime.reporter import Silent
from tests.support.runs import Report, read, settings
from tests.support.tiny_zoo import HIDDEN, kind_named, save_kind

EXPERTS = ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
ROWS, LENGTH, CHOSEN = 2, 32, 2


@pytest.fixture(scope="module")
def scarce(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run on fewer calibration tokens than an expert has columns."""
    folder = tmp_path_factory.mktemp("experts")
    model = save_kind(kind_named("qwen3-moe"), folder / "model")
    config: RunConfig = settings(place, model=model, output=folder / "out", num_samples=ROWS, bits="4", target_bpw=4.5)
    return folder / "out", run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)


def test_the_report_has_the_tokens_of_every_expert(scarce: tuple[Path, Report]) -> None:
    folder, report = scarce
    experts = read(folder / "report.json")["experts"]
    assert list(experts) == EXPERTS  # layer 1 is dense
    for name, tokens in experts.items():
        assert len(tokens) == 8
        assert sum(tokens) == ROWS * LENGTH * CHOSEN
        assert tokens[3] == report["layers"][f"{name}.3.up_proj"]["num_tokens"]


def test_fallbacks_are_counted_and_said(scarce: tuple[Path, Report]) -> None:
    _, report = scarce
    lacking = [count for tokens in report["experts"].values() for count in tokens if count < HIDDEN]
    assert report["fallbacks"] == 3 * len(lacking) > 0
    said = [text for text in report["warnings"] if "fewer calibration tokens" in text]
    assert len(said) == 1
    assert said[0].startswith(f"{len(lacking)} of 16 experts (first model.layers.0.mlp.experts.")


def test_card_and_terminal_show_the_spread(scarce: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    folder, report = scarce
    counts = sorted(count for tokens in report["experts"].values() for count in tokens)
    card = (folder / "README.md").read_text()
    assert "16 experts in 2 blocks; calibration tokens per expert: min" in card
    print_report(report, "out", 100)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"min {counts[0]}, median" in shown and f"max {counts[-1]}" in shown


def test_a_dense_model_has_neither(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    assert report["experts"] == {} and report["fallbacks"] == 0
    assert "calibration tokens per expert" not in (folder / "README.md").read_text()


def test_experts_without_any_token_are_named() -> None:
    layers = {
        f"model.layers.0.mlp.experts.{number}.{role}": {"num_tokens": count, "fallback": lent}
        for number, (count, lent) in enumerate([(90, None), (0, "lent"), (5, "lent")])
        for role in ("up_proj", "down_proj")
    } | {"model.layers.0.self_attn.o_proj": {"num_tokens": 95, "fallback": None}}
    assert routed_tokens(layers) == {"model.layers.0.mlp.experts": [90, 0, 5]}
    lacking, unseen = routing_warnings(layers)
    assert lacking.startswith("2 of 3 experts (first model.layers.0.mlp.experts.1)")
    assert unseen.startswith("1 of 3 experts (first model.layers.0.mlp.experts.1)")
    assert routing_warnings({name: m | {"fallback": None, "num_tokens": 90} for name, m in layers.items()}) == []
