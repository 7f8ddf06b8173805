"""Inputs of layers as engines round them: scales of each token are computed while the model runs.

Those of NVFP4 are E4M3 numbers over one divisor of the layer, which lies in the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.formats.activations import ActivationFormat
from hawqtool.rounding.floats.elements import E4M3, ELEMENTS

_INT8_RANGE = 127.5
"""compressed-tensors divides by it; codes go from -128 to 127."""

_ZERO_GROUP = 0.125
"""E4M3 scale, times the divisor, of a group whose own would be zero (compressed-tensors)."""

_ROUND_UP = 1.75
"""Mantissa from which the power of two of an MX scale is the next one (compressed-tensors, torchao: rounding to even
in the element); the plain floor of the OCP text would cut all that lies above the largest code."""


def fake_quantize(inputs: Tensor, activations: ActivationFormat) -> Tensor:
    """Inputs ``[..., in]`` rounded to the values that a kernel multiplies, in their dtype.

    Args:
        inputs: Any floating dtype; the last dimension is that of the layer's inputs, all others are tokens.
        activations: How they are rounded.
    """
    width = activations.group_size or inputs.shape[-1]
    groups = inputs.unflatten(-1, (-1, width))
    scale = _scales(groups.abs().amax(-1, keepdim=True), activations)
    scaled = groups / scale
    if activations.element == "int8":
        rounded = torch.round(scaled.clamp_(-128, 127))
    else:
        rounded = ELEMENTS[activations.element].nearest_(scaled)
    return (rounded * scale).flatten(-2).to(inputs.dtype)


def _scales(peak: Tensor, activations: ActivationFormat) -> Tensor:
    """Scales of largest magnitudes, in their dtype, E4M3 ones in float32; never zero."""
    if activations.has_divisor:
        assert activations.divisor is not None  # calibration gave it
        # In the order of compressed-tensors: the quotient is rounded to the dtype of the inputs first.
        wanted = (peak / ELEMENTS[activations.element].largest).float() * activations.divisor
        stored = E4M3.nearest_(wanted)
        return torch.where(stored == 0, _ZERO_GROUP, stored) / activations.divisor
    if activations.scale == "e8m0":
        element = ELEMENTS[activations.element]
        mantissa, exponent = torch.frexp(peak.float())
        # frexp's mantissas begin at 0.5: twice as large they begin at 1.
        power = exponent - 1 + (2 * mantissa >= _ROUND_UP).int()
        _, largest = torch.frexp(torch.tensor(element.largest, dtype=torch.float32))
        power = (power - (int(largest) - 1)).clamp_min(-126)
        return torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), power), torch.ones_like(peak))
    most = _INT8_RANGE if activations.element == "int8" else ELEMENTS[activations.element].largest
    scale = peak / most
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
