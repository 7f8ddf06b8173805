"""Scores of experts that are scored together, against the definitions in float64 and against each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hawqtool.records import SWEEP_METRICS
from hawqtool.sensitivity import scores
from hawqtool.sensitivity.scores import SIGNED, LayerRows, experts_together, score_experts, score_rows

TOKENS = ((3, 0, 7, 2), (5, 1, 4, 9), (0, 0, 0, 0))
"""Tokens of each row that three experts see."""
POSITIONS, OUTPUTS, WIDTH, HEIGHTS, LABELS = 12, 10, 24, (8, 6), ("a", "b")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts() -> tuple[list[list[LayerRows]], list[list[dict[str, Tensor]]]]:
    """What each expert's two layers saw, and their errors."""
    layers, errors = [], []
    for e, tokens in enumerate(TOKENS):
        inputs = [random(count, WIDTH, seed=10 * e + n) for n, count in enumerate(tokens)]
        rows = [
            list(zip(inputs, [random(n, height, seed=100 * e + i) for i, n in enumerate(tokens)], strict=True))
            for height in HEIGHTS
        ]
        layers.append([LayerRows(of_layer, POSITIONS, OUTPUTS) for of_layer in rows])
        errors.append(
            [
                {label: 0.1 * random(height, WIDTH, seed=7 * e + i) for i, label in enumerate(LABELS)}
                for height in HEIGHTS
            ]
        )
    return layers, errors


def reference(layer: LayerRows, error: Tensor) -> dict[str, Tensor]:
    """The definitions of `score_rows`, row by row, float64."""
    rows = [(x.double(), g.double()) for x, g in layer.rows]
    full, error, m = torch.stack([g.T @ x for x, g in rows]), error.double(), layer.outputs
    power = torch.stack([g.square().sum(0) / layer.positions for _, g in rows])
    moved = torch.stack([(x @ error.T).square().sum(0) for x, _ in rows])
    seen = sum(len(x) for x, _ in rows) / len(rows) or 1 / len(rows)
    product = (power * moved.mean(0) + power.mean(0) * moved - power.mean(0) * moved.mean(0)).sum(1)
    return {
        "fisher": (full * error).square().sum((1, 2)) / (2 * m),
        "projection": (full * error).sum(2).square().sum(1) / (2 * m),
        SIGNED: (full * error).sum((1, 2)) / m**0.5,
        "hawq-ggn": full.square().sum((1, 2)) * error.square().sum() / (2 * m * error.numel()),
        "kron": product * layer.positions / (2 * m * seen),
    }


@pytest.mark.parametrize("elements", [1 << 22, 2 * 8 * 24])
@pytest.mark.parametrize("metrics", [SWEEP_METRICS, ("kron",), ("projection",)])
def test_they_are_the_sums_of_the_definitions(
    elements: int, metrics: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", elements)
    layers, errors = experts()
    found = score_experts(layers, errors, metrics)
    alone = [score_rows(*pair, metrics) for pair in zip(layers, errors, strict=True)]
    for index, values in enumerate(found):
        assert values.keys() == alone[0][index].keys()
        for label in LABELS:
            exact = [reference(of[index], e[index][label]) for of, e in zip(layers, errors, strict=True)]
            for metric, by_label in values.items():
                wanted = torch.stack([of_expert[metric] for of_expert in exact]).sum(0)
                torch.testing.assert_close(by_label[label], wanted, rtol=2e-6, atol=1e-7)
                one_by_one = torch.stack([of_expert[index][metric][label] for of_expert in alone]).sum(0)
                torch.testing.assert_close(by_label[label], one_by_one, rtol=5e-6, atol=1e-6)


def test_half_precision_inputs_are_taken_as_they_are() -> None:
    layers, errors = experts()
    halves = [
        [replace(of, rows=[(x.bfloat16(), g.bfloat16()) for x, g in of.rows]) for of in of_expert]
        for of_expert in layers
    ]
    for index, values in enumerate(score_experts(halves, errors)):
        exact = [reference(halves[e][index], errors[e][index]["a"])["kron"] for e in range(len(TOKENS))]
        torch.testing.assert_close(values["kron"]["a"], torch.stack(exact).sum(0), rtol=2e-6, atol=1e-9)


def test_so_many_go_together_as_memory_is_meant_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = experts()[1][0]
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", 3 * 2 * WIDTH * sum(HEIGHTS))
    assert experts_together(errors) == 3
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", 1)
    assert experts_together(errors) == 1
