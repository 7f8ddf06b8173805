"""Second moments of layer inputs: products summed over tokens, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from hawqtool.rounding.kernels.tensor_cores import coarse_products, split_in_two

_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Tokens of a product: float32 sums stay short, and so does the second matrix that a product needs.

A CPU multiplies 32,768 tokens of 576 columns in a fifth less time so than 16,384 together.
"""

_TENSOR_CORES = (8, 0)
"""Compute capability from which tensor cores multiply bfloat16."""

GRAM_PANEL = 192
"""Rows of a symmetric product that are computed together on a CPU: a third less work than the whole at 576 columns."""

_TILED_WIDTH, _TILE = 4096, 2048
"""Width from which a matrix is computed in panels on a GPU, and the rows of such a panel."""


def gram(inputs: Tensor, roots: Tensor | None = None) -> Tensor:
    """Mean of x xᵀ over tokens, ``[in, in]`` float32, from ``[tokens, in]``.

    Half-precision inputs are multiplied on tensor cores where there are any: their products are exact in float32,
    which is also the dtype of the sums and of the output. The scaling comes last, since it would round the inputs.

    Args:
        inputs: ``[tokens, in]``.
        roots: ``[tokens]`` float32, roots of the tokens' importance w: then it is the mean of w x xᵀ. In half precision
            these round the inputs once more, far below the damping of the matrix.
    """
    width = inputs.shape[1]
    half = has_float32_products(inputs.device, inputs.dtype)
    panel = _panel(inputs, width)
    total = torch.zeros(width, width, dtype=torch.float32, device=inputs.device)
    for part in _scaled_parts(inputs, roots):
        _add_lower_panels(total, part if half else part.float(), panel, half)
    _mirror(total, panel)
    return total.div_(inputs.shape[0])


def quadratic_form(error: Tensor, gram: Tensor, coarse: bool = False) -> Tensor:
    """Trace of D H Dᵀ, the mean squared output of ``error`` on the tokens behind ``gram``.

    H is symmetric: on a CPU only its upper panels are multiplied, a third less work at 576 columns.

    Args:
        error: ``[out, in]`` float32.
        gram: ``[in, in]`` float32.
        coarse: Let tensor cores multiply in TF32, whose roundings (2⁻¹¹) average out: for what is only told.
    """
    with coarse_products() if coarse and gram.is_cuda else nullcontext():
        return _quadratic_form(error, gram)


def fine_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of float32 matrices; on a GPU by three products of TF32, which take less than half the time.

    They are those of the parts of both (see `split_in_two`). Tensor cores add up in float32.
    """
    return _product_of_parts(left, right) if left.is_cuda else left @ right


def _product_of_parts(left: Tensor, right: Tensor) -> Tensor:
    (a, a_rest), (b, b_rest) = split_in_two(left), split_in_two(right)
    with coarse_products():
        return (a @ b_rest).add_(a_rest @ b).add_(a @ b)


def _quadratic_form(error: Tensor, gram: Tensor) -> Tensor:
    width = len(gram)
    panel = max(width, 1) if gram.is_cuda else GRAM_PANEL
    total = gram.new_zeros(())
    for first in range(0, width, panel):
        columns = slice(first, first + panel)
        product = error[:, columns] @ gram[columns, columns]
        if first:
            product.addmm_(error[:, :first], gram[:first, columns], alpha=2.0)
        total += product.mul_(error[:, columns]).sum()
    return total


def mean_product(left: Tensor, right: Tensor, roots: Tensor | None = None) -> Tensor:
    """Mean of l rᵀ over tokens, ``[m, n]`` float32, from ``[tokens, m]`` and ``[tokens, n]`` of one dtype.

    With the roots ``[tokens]`` of the tokens' importance w it is the mean of w l rᵀ.
    """
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    for first, second in zip(_scaled_parts(left, roots), _scaled_parts(right, roots), strict=True):
        total += token_product(first, second)
    return total.div_(left.shape[0])


def _scaled_parts(inputs: Tensor, roots: Tensor | None) -> Iterator[Tensor]:
    """Some tokens ``[tokens, in]`` at a time, times the roots of their importance."""
    tokens = _TOKENS[inputs.device.type]
    if roots is None:
        yield from inputs.split(tokens)
        return
    for part, root in zip(inputs.split(tokens), roots.split(tokens), strict=True):
        yield part * root.to(part.dtype)[:, None]


def token_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over tokens of l rᵀ, ``[m, n]`` float32, from ``[tokens, m]`` and ``[tokens, n]``; see `gram`."""
    if left.dtype == right.dtype and has_float32_products(left.device, left.dtype):
        return torch.mm(left.t(), right, out_dtype=torch.float32, out=out)
    return torch.mm(left.t().float(), right.float(), out=out)


def has_float32_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half-precision matrices can be multiplied as they are with float32 sums and a float32 result.

    torch has that product for NVIDIA GPUs, from 2.8 on. Elsewhere inputs are made float32 first, which gives the same
    products at a lower rate.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    return "dtype" in torch.ops.aten.mm.overloads() and torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def pack_panels(matrix: Tensor) -> Tensor:
    """What `gram` computed of a matrix ``[in, in]``: its panels from the first column to the diagonal, ``[n]``."""
    panel = _panel(matrix, len(matrix))
    return torch.cat([matrix[row : row + panel, : row + panel].flatten() for row in range(0, len(matrix), panel)])


def unpack_panels(packed: Tensor, size: int) -> Tensor:
    """The matrix ``[size, size]`` of its panels, to the bit: the rest of it is their mirror image."""
    matrix, first = packed.new_empty(size, size), 0
    panel = _panel(packed, size)
    for row in range(0, size, panel):
        target = matrix[row : row + panel, : row + panel]
        target.copy_(packed[first : first + target.numel()].view(target.shape))
        first += target.numel()
    _mirror(matrix, panel)
    return matrix


def _panel(inputs: Tensor, width: int) -> int:
    """Rows of the matrix that are computed together; each panel stops at the diagonal."""
    if not inputs.is_cuda:
        return GRAM_PANEL
    return _TILE if width >= _TILED_WIDTH else max(width, 1)


def _add_lower_panels(total: Tensor, part: Tensor, panel: int, half: bool) -> None:
    """Add the products of ``[tokens, in]`` to what lies on and below the diagonal, panel by panel."""
    for row in range(0, len(total), panel):
        # One product per panel: from the first column to the diagonal.
        left, right = part[:, row : row + panel].t(), part[:, : row + panel]
        target = total[row : row + panel, : row + panel]
        if half:
            target += torch.mm(left, right, out_dtype=torch.float32)
        else:
            target.addmm_(left, right)


def _mirror(total: Tensor, panel: int) -> None:
    """Fill what lies above the diagonal's panels from what lies below."""
    for row in range(panel, len(total), panel):
        total[:row, row : row + panel] = total[row : row + panel, :row].t()
