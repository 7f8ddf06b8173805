"""Places in a codebook of floats: rounding them gives the nearest value, and they move by what lies between values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hawqtool.formats import parse_label
from hawqtool.rounding.floats.elements import CODE_DTYPE, ELEMENTS
from hawqtool.rounding.floats.scale_search import common_divisor, search_float_scales
from hawqtool.rounding.grid import Quantized, dequantize, nearest_codes
from hawqtool.rounding.learned.block import Batches, Schedule, refine
from hawqtool.rounding.learned.codebook import FlatFloats, places
from hawqtool.rounding.learned.fake_quant import EDGE
from hawqtool.rounding.spec import InitialRounding

ROWS, COLUMNS = 24, 64


def start(label: str, seed: int = 0) -> InitialRounding:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05
    fmt, divisor = parse_label(label), common_divisor([weight])
    scales = search_float_scales(weight, torch.ones(COLUMNS), fmt, torch.bfloat16, divisor)
    kept = divisor if fmt.floats and fmt.floats.scale == "e4m3" else None
    return InitialRounding("layer", weight, Quantized(nearest_codes(weight, scales, fmt), scales, None, kept), fmt)


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounded_places_are_the_nearest_values(name: str) -> None:
    element = ELEMENTS[name]
    values = element.values().double()
    numbers = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double() * element.largest / 2
    found = places(numbers.float(), values.float())
    nearest = (numbers[:, None] - values).abs().argmin(1)  # ties are unlikely
    assert torch.equal(found.round().clamp(0, len(values) - 1).long(), nearest)
    assert torch.equal(places(values.float(), values.float()), torch.arange(len(values)).float())
    beyond = places(torch.tensor([2 * element.largest]), values.float())
    last = values[-1] - values[-2]
    assert float(beyond) == pytest.approx(len(values) - 1 + float(element.largest / last))


@pytest.mark.parametrize("label", ["nvfp4", "mxfp4", "fp8", "mxfp8"])
def test_the_start_is_kept_and_codes_move_by_one_value(label: str) -> None:
    initial = start(label)
    flat = FlatFloats([initial], reach=1.0)
    assert torch.equal(flat.weights(torch.bfloat16, False)["layer"], dequantize(*initial.rounded))
    kept = flat.rounded()["layer"]
    assert torch.equal(kept.codes.float(), initial.rounded.codes.float()) and kept.codes.dtype == CODE_DTYPE
    assert kept.divisor == initial.rounded.divisor and torch.equal(kept.scales, initial.rounded.scales)
    codes = initial.rounded.codes
    lower, higher = ELEMENTS[initial.quant_format.floats.element].neighbours(codes)  # type: ignore[union-attr]
    for push, expected in ((1.0, higher), (-1.0, lower)):
        moved = FlatFloats([initial], reach=1.0, margin=EDGE)  # all in the middle of their cells
        moved.latent.add_(push)
        moved.confine()
        assert torch.equal(moved.rounded()["layer"].codes.float(), expected)


@pytest.mark.parametrize("label", ["nvfp4", "fp8"])
def test_gradients_are_those_of_the_line_between_values(label: str) -> None:
    initial = start(label)
    flat = FlatFloats([initial], reach=1.0)
    value = flat.weights(torch.float32, True)["layer"]
    into = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    (value * into).sum().backward()
    latent = flat.latent.double()
    values, below = flat.values.double(), latent.floor().long().clamp(0, len(flat.values) - 2)
    slope = values[below + 1] - values[below]
    expected = into.double().view_as(slope) * flat.scale.double() * slope
    flat.collect()
    assert flat.latent.grad is not None
    torch.testing.assert_close(flat.latent.grad.double(), expected, rtol=1e-6, atol=0)
    assert (flat.log_change.grad is not None) is (label == "fp8")


@pytest.mark.parametrize("label", ["nvfp4", "fp8"])
def test_learning_lowers_the_error_of_outputs(label: str) -> None:
    initial = start(label)
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = [torch.randn(2, 64, COLUMNS, generator=generator) @ mix for _ in range(6)]

    def forward(weights: dict[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        return hidden @ weights["layer"].t()

    targets = [hidden @ initial.weight.t() for hidden in inputs]
    fitting, held_out = Batches(inputs[:4], targets[:4]), Batches(inputs[4:], targets[4:])
    schedule = Schedule(steps=60, latent_rate=0.002)
    refined = refine([initial], {}, forward, fitting, held_out, schedule)  # type: ignore[arg-type]
    assert refined.log.after < 0.93 * refined.log.before
    found = dequantize(*refined.layers["layer"]).float()
    errors = [float((x @ (w - initial.weight).t()).square().sum()) for w in (found, start_of(initial)) for x in inputs]
    assert sum(errors[:6]) < sum(errors[6:])


def start_of(initial: InitialRounding) -> Tensor:
    return dequantize(*initial.rounded).float()
