"""Compare the compiled kernels with the eager code, Triton's on a GPU, Numba's on a CPU: codes, loss and time.

Weights and Gram matrices are random, in the shapes of real layers. Codes may differ where a float32 sum falls on
a tie, which then changes the rest of the row, so the bound is on the loss of the layer, tr D H Dᵀ. On a GPU rotated
weights are compared with those of the CPU, which must have the same bits, and fine products with float64.

    python scripts/benchmarks/check_kernels.py [--shapes 576x576,4096x4096] [--bits 2,3,4,8] [--device cpu]
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hawqtool.checkpoint.index import TensorInfo
from hawqtool.checkpoint.rotated.codec import rotate_tensor, rotated
from hawqtool.checkpoint.rotated.hadamard import Rotation
from hawqtool.formats import QuantFormat
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.gram import fine_product, quadratic_form
from hawqtool.rounding.grid import dequantize, expand_scales, nearest_codes, search_grid
from hawqtool.rounding.kernels.dispatch import EAGER, VARIABLE, kernel_for

SHAPES = "576x576,1536x576,576x1536,4096x4096,14336x4096,4096x14336"
LOSS_BOUND = 1e-3
"""Relative difference of the layer's loss."""
GROUP_SIZE = 64
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns 1 when a bound fails, 2 where the device has no kernels.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    parser = argparse.ArgumentParser(description="Compare the compiled kernels with the eager code.")
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCOLUMNS, comma-separated")
    parser.add_argument("--bits", default="2,3,4,8", help="widths, comma-separated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    kernel = kernel_for(device)
    if kernel == EAGER:
        print(
            f"error: no kernels for --device {device.type}: a GPU needs triton; unset HAWQTOOL_KERNEL", file=sys.stderr
        )
        return 2
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, {kernel}, group size {GROUP_SIZE}")
    print("     shape bits grid   what  differ %  loss diff   eager s   fused s  speed-up", flush=True)
    failures = 0
    for shape in options.shapes.split(","):
        rows, columns = (int(n) for n in shape.split("x"))
        case = _layer(rows, columns, device)
        for line, loss_difference in compare(*case, kernel, [int(b) for b in options.bits.split(",")]):
            failed = not loss_difference <= LOSS_BOUND
            failures += failed
            print(f"{shape:>10} {line}{'  FAIL' if failed else ''}", flush=True)
    print(f"{failures} above the bound of {LOSS_BOUND} on the loss" if failures else "all within the bound")
    if device.type == "cuda":
        failures += sum(not check(device) for check in (check_rotations, check_products))
    return int(failures > 0)


def check_rotations(device: torch.device) -> bool:
    """Whether rotated tensors have the bits that a CPU gives them, whichever sides are rotated."""
    same = True
    for size in (4096, 576, 640, 24):
        rotation = Rotation(size, 3)
        values = {"w": torch.randn(size, size).bfloat16(), "g": torch.randn(size).bfloat16()}
        base, gain = (TensorInfo(n, "BF16", tuple(v.shape), Path("none"), 0, v.nbytes) for n, v in values.items())
        reader = replace(rotated(base), last=rotation, gain=gain, offset=1.0)
        for info in (reader, replace(rotated(base), first=rotation), replace(reader, first=rotation)):
            for dtype in (None, "F32", "F64"):
                read = partial(_named, values)
                found = [rotate_tensor(info, read, dtype, place) for place in (torch.device("cpu"), device)]
                same = same and torch.equal(found[0], found[1].cpu())
    print(f"rotated weights: {'the same bits' if same else 'other bits  FAIL'}")
    return same


def _named(values: dict[str, Tensor], info: TensorInfo) -> Tensor:
    return values[info.name]


def check_products(device: torch.device) -> bool:
    """Whether fine products are as close to float64 as those of float32 are, within a factor."""
    left, right = (torch.randn(4096, 4096, device=device) for _ in range(2))
    exact = left.double() @ right.double()
    fine, plain = ((found.double() - exact).abs().max().item() for found in (fine_product(left, right), left @ right))
    close = fine <= 8 * plain
    print(f"fine products: error {fine:.2g}, float32 {plain:.2g}{'' if close else '  FAIL'}")
    return close


def compare(
    weight: Tensor, gram: Tensor, factor: Factor, kernel: str, widths: Sequence[int]
) -> Iterator[tuple[str, float]]:
    """A line of the table and the relative difference of the loss, for each setting of one layer."""
    rows, columns = weight.shape
    for bits, symmetric in itertools.product(widths, (True, False)):
        fmt = QuantFormat(bits=bits, group_size=GROUP_SIZE, symmetric=symmetric)
        yield compare_search(weight, factor, kernel, fmt)
        scales, zeros = search_grid(weight, factor.diagonal, fmt, torch.bfloat16, both_signs=symmetric)
        step = expand_scales(scales, columns)
        zero = None if zeros is None else expand_scales(zeros, columns)
        low, high = (weight.new_full((rows,), float(c)) for c in (fmt.min_code, fmt.max_code))
        for beta in (0.0, 0.1):
            # The same block for both, so that only the arithmetic inside a block can differ.
            call = partial(round_compensated, weight, RowGrids(step, low, high, zero), factor, beta, 128)
            codes, seconds = zip(*(_timed(call, k, weight.device) for k in (EAGER, kernel)), strict=True)
            errors = [dequantize(c, scales, zeros).float() - weight for c in codes]
            losses = [float(quadratic_form(error, gram)) for error in errors]
            differ = 100 * float((codes[0] != codes[1]).float().mean())
            yield _line(fmt, f"b={beta}", differ, losses, seconds)


def compare_search(weight: Tensor, factor: Factor, kernel: str, fmt: QuantFormat) -> tuple[str, float]:
    """The same for the search of the scales; the loss is the weighted error that the search minimises."""
    search = partial(search_grid, weight, factor.diagonal, fmt, torch.bfloat16, fmt.symmetric)
    losses, seconds, grids = [], [], []
    for name in (EAGER, kernel):
        grid, spent = _timed(search, name, weight.device)
        codes = nearest_codes(weight, grid[0], fmt, grid[1])
        error = dequantize(codes, *grid).float() - weight
        losses.append(float((error.square() * factor.diagonal).sum()))
        seconds.append(spent)
        grids.append(grid[0])
    differ = 100 * float((grids[0] != grids[1]).float().mean())
    return _line(fmt, "scales", differ, losses, seconds)


def _line(
    fmt: QuantFormat, what: str, differ: float, losses: Sequence[float], seconds: Sequence[float]
) -> tuple[str, float]:
    loss_difference = abs(losses[1] / losses[0] - 1)
    times = f"{seconds[0]:>9.4f} {seconds[1]:>9.4f} {seconds[0] / seconds[1]:>8.1f}x"
    grid = "sym " if fmt.symmetric else "asym"
    return f"{fmt.bits:>4} {grid} {what:>6} {differ:>9.4f} {loss_difference:>10.1e} {times}", loss_difference


def _layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Factor]:
    """Random weight, Gram matrix and factor: correlated inputs, a few channels much larger than the others."""
    generator = torch.Generator(device).manual_seed(rows + columns)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    tokens = 4 * columns
    gains = torch.exp(0.5 * normal(columns))
    gains[:: max(1, columns // 8)] *= 10
    inputs = (normal(tokens, columns) + normal(tokens, columns // 8) @ normal(columns // 8, columns) * 0.2) * gains
    gram = inputs.t() @ inputs / tokens
    return normal(rows, columns) * 0.02, gram, factorize(gram, tokens)


def _timed(call: Callable[[], T], kernel: str, device: torch.device) -> tuple[T, float]:
    """Result and seconds; the kernel is compiled by a first call that is not counted."""
    os.environ[VARIABLE] = kernel
    if kernel != EAGER:
        call()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
