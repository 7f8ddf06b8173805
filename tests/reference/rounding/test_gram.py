"""Gram matrices against float64: all of them, in tiles or not, on tensor cores or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hawqtool.rounding import gram as module
from hawqtool.rounding.gram import gram, has_float32_products

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(tokens, width, generator=generator) * torch.rand(width, generator=generator)).to(dtype)


def exact(x: Tensor) -> Tensor:
    wide = x.double().cpu()
    return wide.t() @ wide / len(x)


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the root of the diagonal entries that it lies between."""
    diagonal = expected.diagonal().sqrt()
    return float(((found.double().cpu() - expected) / torch.outer(diagonal, diagonal)).abs().max())


def tensor_core(left: Tensor, right: Tensor) -> Tensor:
    """A product as tensor cores make it: of numbers rounded to 11 bits, exact, summed in float32 or better."""

    def rounded(x: Tensor) -> Tensor:
        far = x.double() * (2.0**42 + 1)  # Veltkamp's splitting keeps 11 of 53 bits
        return far - (far - x.double())

    return torch.mm(rounded(left), rounded(right)).float()


def test_three_coarse_products_are_a_fine_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(60, 60, generator=generator) * torch.rand(60, generator=generator) for _ in range(2))
    exact_product = left.double() @ right.double()
    scale = left.double().abs() @ right.double().abs()
    coarse = ((tensor_core(left, right) - exact_product).abs() / scale).max()
    monkeypatch.setattr(Tensor, "__matmul__", tensor_core)
    fine = ((module._product_of_parts(left, right) - exact_product).abs() / scale).max()
    assert float(coarse) > 1e-5 and float(fine) < 3e-7


@pytest.mark.parametrize("width", [100, 192, 500])
def test_panels_hold_all_of_a_matrix(width: int) -> None:
    matrix = gram(inputs(40, width, torch.float32))
    packed = module.pack_panels(matrix)
    assert torch.equal(module.unpack_panels(packed, width), matrix)
    assert packed.numel() < matrix.numel() or width <= module.GRAM_PANEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu(dtype: torch.dtype) -> None:
    x = inputs(1000, 48, dtype)
    assert not has_float32_products(x.device, dtype)
    assert worst(gram(x), exact(x)) < 1e-6


@pytest.mark.parametrize("width", [32, 96, 100])
def test_tiles_below_the_diagonal_give_the_whole_matrix(width: int) -> None:
    x = inputs(500, width, torch.float32)
    total = torch.zeros(width, width)
    for part in x.split(200):
        module._add_lower_panels(total, part, 32, half=False)
    if width > 32:
        assert not total[:32, 32:].any()  # what is mirrored is not computed
    module._mirror(total, 32)
    assert worst(total / len(x), exact(x)) < 1e-6
    assert torch.equal(total[:32, 32:], total[32:, :32].t())


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [576, 4096, 5000])
def test_on_a_gpu(dtype: torch.dtype, width: int) -> None:
    x = inputs(40_000, width, dtype).cuda()
    assert has_float32_products(x.device, dtype)
    assert worst(gram(x), exact(x)) < 1e-5
