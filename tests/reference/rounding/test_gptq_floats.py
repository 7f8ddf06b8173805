"""The column loop on a codebook, against Algorithm 1 of GPTQ by the inverse of the Gram matrix, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hawqtool.rounding.factor import factorize
from hawqtool.rounding.floats.elements import ELEMENTS
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.gram import quadratic_form


def rounded_by_inverse(weight: Tensor, scale: Tensor, gram: Tensor, order: Tensor, values: Tensor) -> Tensor:
    """Values of the codebook, ``[rows, in]`` float64: each error goes to the columns left by H⁻¹ of these alone."""
    left, target = order.tolist(), weight.clone()
    result = torch.zeros_like(weight)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(gram[left][:, left])
        scaled = target[:, column] / scale[:, 0]
        result[:, column] = values[(scaled[:, None] - values).abs().argmin(1)]
        error = (target[:, column] - result[:, column] * scale[:, 0]) / inverse[0, 0]
        target[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return result


@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
def test_the_loop_on_a_codebook_is_gptq(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.randn(48, 48, generator=generator).double() * 0.3 + torch.eye(48))
    gram = inputs.T @ inputs
    weight = torch.randn(24, 48, generator=generator).double()
    element = ELEMENTS[name]
    scale = weight.abs().amax(1, keepdim=True) / element.largest
    factor = factorize(gram.float(), 400, 0.01, name="x")
    damped = gram.clone()
    damped.diagonal().copy_(factor.diagonal.double())
    codes = round_compensated(weight.float(), RowGrids(scale.float(), scale[:, 0], scale[:, 0], None, element), factor)
    assert codes.dtype == torch.float8_e4m3fn
    expected = rounded_by_inverse(weight, scale, damped, factor.order, element.values().double())
    # A tie that float32 decides otherwise goes on through the row, so rows are compared as wholes.
    assert float((codes.double() == expected).all(1).double().mean()) > 0.7
    plain = element.nearest_(weight / scale) * scale - weight
    losses = [quadratic_form(d, damped) for d in (codes.double() * scale - weight, expected * scale - weight, plain)]
    assert abs(float(losses[0] / losses[1]) - 1) < 0.02 and float(losses[0]) < 0.7 * float(losses[2])
