"""Keys, values and queries as engines with an FP8 cache compute with them."""

from __future__ import annotations

from torch import Tensor

from hawqtool.rounding.floats.elements import E4M3


def round_cached(states: Tensor, scales: Tensor | None = None) -> Tensor:
    """States rounded to E4M3 times their scales, to even; what is beyond the largest number is cut.

    Args:
        states: ``[rows, heads, positions, width]``, any floating dtype.
        scales: ``[1]`` or ``[heads, 1, 1]`` float32, powers of two; None for 1, as queries have it.

    Returns:
        The rounded states, in their dtype; gradients pass as if nothing was rounded.
    """
    plain = states.detach().float()
    scaled = plain.clone() if scales is None else plain / scales
    rounded = E4M3.nearest_(scaled)
    found = (rounded if scales is None else rounded * scales).to(states.dtype)
    # A difference of equal numbers is zero: the value is the rounded one to the bit.
    return found.detach() + (states - states.detach()) if states.requires_grad else found
