"""Gram matrices of layer inputs."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 1 << 14
"""Tokens of a product: float32 sums stay short, and so does the second matrix that a product needs."""

_TENSOR_CORES = (8, 0)
"""Compute capability from which tensor cores multiply bfloat16."""

_TILED_WIDTH, _TILE = 4096, 2048
"""Width from which a matrix is cut into square tiles, of which those above the diagonal are mirrored."""


def gram(inputs: Tensor) -> Tensor:
    """Mean of x xᵀ over tokens, ``[in, in]`` float32, from ``[tokens, in]``.

    Half-precision inputs are multiplied on tensor cores where there are any: their products are exact in float32,
    which is also the dtype of the sums and of the output. The scaling comes last, since it would round the inputs.
    """
    width = inputs.shape[1]
    half = has_float32_products(inputs.device, inputs.dtype)
    tile = _TILE if half and width >= _TILED_WIDTH else max(width, 1)
    total = torch.zeros(width, width, dtype=torch.float32, device=inputs.device)
    for part in inputs.split(_TOKENS):
        _add_lower_tiles(total, part if half else part.float(), tile, half)
    _mirror(total, tile)
    return total.div_(inputs.shape[0])


def has_float32_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half-precision matrices can be multiplied as they are with float32 sums and a float32 result.

    torch has that product for NVIDIA GPUs, from 2.8 on. Elsewhere inputs are made float32 first, which gives the same
    products at a lower rate.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    return "dtype" in torch.ops.aten.mm.overloads() and torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def _add_lower_tiles(total: Tensor, part: Tensor, tile: int, half: bool) -> None:
    """Add the products of ``[tokens, in]`` to the tiles of a matrix that lie on and below its diagonal."""
    for row in range(0, len(total), tile):
        left = part[:, row : row + tile].t()
        # One product per row of tiles: from the first column to the diagonal.
        right, target = part[:, : row + tile], total[row : row + tile, : row + tile]
        if half:
            target += torch.mm(left, right, out_dtype=torch.float32)
        else:
            target.addmm_(left, right)


def _mirror(total: Tensor, tile: int) -> None:
    """Fill the tiles above the diagonal from those below."""
    for row in range(tile, len(total), tile):
        total[:row, row : row + tile] = total[row : row + tile, :row].t()
