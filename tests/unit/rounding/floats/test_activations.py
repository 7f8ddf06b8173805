"""Rounded inputs, to the bit as compressed-tensors rounds them where transformers runs a folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from hawqtool.formats.activations import ACTIVATIONS
from hawqtool.rounding.floats.activations import fake_quantize
from hawqtool.rounding.floats.scale_search import divisor_of_peak


@pytest.mark.parametrize("label", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_loaders_round_them(label: str, dtype: torch.dtype) -> None:
    activations = ACTIVATIONS[label]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 5, 256, generator=generator) * torch.logspace(-3, 2, 256)
    inputs[1, 2] = 0  # a token of padding
    inputs = inputs.to(dtype)
    args, divisor = QuantizationArgs(**activations.entry), None
    if activations.has_divisor:
        # Half of what would hold the largest: scales are cut, as those of inputs that calibration did not see are.
        activations = replace(activations, divisor=2 * divisor_of_peak(float(inputs.abs().max())))
        divisor = torch.tensor([activations.divisor])
    scale, zero = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Linear(1, 1), divisor)
    expected = reference(inputs, scale, zero, args, global_scale=divisor)
    found = fake_quantize(inputs, activations)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert 0 < float((found - inputs).square().sum() / inputs.square().sum()) < 0.02
