"""Round the layers of one input group by plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.records import LayerMetrics, RoundedLayer
from hawqtool.rounding.compensate import round_compensated
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.grid import Quantized, dequantize, expand_scales, nearest_codes, search_grid

ROUNDINGS = ("rtn", "gptq", "foem")


@dataclass(frozen=True)
class RoundingMethod:
    """How weights are rounded.

    Args:
        name: ``rtn``, ``gptq`` or ``foem``.
        beta: FOEM's β; ignored by the others.
        both_signs: Allow negative scales on symmetric grids (see `search_scales`).
        damping: Fraction of the mean diagonal; None chooses by tokens per column.
    """

    name: str = "gptq"
    beta: float = 0.1
    both_signs: bool = True
    damping: float | None = None

    @property
    def feedback_beta(self) -> float:
        """β of the column loop."""
        return self.beta if self.name == "foem" else 0.0


@dataclass(frozen=True)
class Task:
    """One weight to round in one format: ``weight`` is ``[out, in]`` float32."""

    name: str
    weight: Tensor
    quant_format: QuantFormat
    stored_dtype: torch.dtype


def round_group(tasks: Sequence[Task], factor: Factor, method: RoundingMethod) -> list[Quantized]:
    """Codes, scales and zero points of every task, in order; all share the inputs behind ``factor``.

    Grids are searched on the original weights and stay fixed (static groups). Compensated tasks are stacked
    by rows and rounded in one loop.
    """
    grids = [search_grid(t.weight, factor.diagonal, t.quant_format, t.stored_dtype, method.both_signs) for t in tasks]
    if method.name == "rtn":
        return [
            Quantized(nearest_codes(t.weight, scales, t.quant_format, zeros), scales, zeros)
            for t, (scales, zeros) in zip(tasks, grids, strict=True)
        ]
    heights = [len(t.weight) for t in tasks]
    weight = torch.cat([t.weight for t in tasks])
    step = torch.cat([expand_scales(scales, weight.shape[1]) for scales, _ in grids])
    codes = round_compensated(
        weight,
        step,
        _per_row([t.quant_format.min_code for t in tasks], heights, weight),
        _per_row([t.quant_format.max_code for t in tasks], heights, weight),
        factor,
        method.feedback_beta,
        zero=_stacked_zeros(grids, weight.shape[1]),
    )
    return [Quantized(part, *grid) for part, grid in zip(codes.split(heights), grids, strict=True)]


def _stacked_zeros(grids: Sequence[tuple[Tensor, Tensor | None]], columns: int) -> Tensor | None:
    """Zero point of every weight of stacked tasks, ``[rows, in]`` float32; None where all are symmetric."""
    if all(zeros is None for _, zeros in grids):
        return None
    return torch.cat([expand_scales(torch.zeros_like(s) if z is None else z, columns) for s, z in grids])


def _per_row(values: Sequence[int], heights: Sequence[int], like: Tensor) -> Tensor:
    return torch.cat([like.new_full((h,), float(v)) for v, h in zip(values, heights, strict=True)])


def round_layers(tasks: Sequence[Task], gram: Tensor, factor: Factor, method: RoundingMethod) -> list[RoundedLayer]:
    """Round an input group and measure what was lost.

    Args:
        tasks: The layers of the group, each in its planned format.
        gram: ``[in, in]`` float32, mean of x xᵀ over the rounding tokens.
        factor: Its factor.
        method: Rounding method.

    Raises:
        NumericalError: If a result is not finite; names the layer.
    """
    start = time.perf_counter()
    results = round_group(tasks, factor, method)
    seconds = (time.perf_counter() - start) / len(tasks)
    layers = []
    for task, result in zip(tasks, results, strict=True):
        metrics = replace(_metrics(task, result, gram, factor), seconds=seconds)
        if not torch.isfinite(torch.tensor([metrics.output_error, metrics.weight_error])).all():
            raise NumericalError(
                f"{task.name}: rounding gave values that are not finite; check this weight for NaN or Inf"
            )
        layers.append(RoundedLayer(task.name, task.quant_format, result.codes, result.scales, metrics, result.zeros))
    return layers


def _metrics(task: Task, result: Quantized, gram: Tensor, factor: Factor) -> LayerMetrics:
    weight, fmt = task.weight, task.quant_format
    codes, scales, zeros = result
    error = dequantize(*result).float() - weight
    plain = nearest_codes(weight, scales, fmt, zeros)
    power = quadratic_form(weight, gram).clamp_min(1e-30)
    steps = expand_scales(scales, weight.shape[1])
    at_bound = (codes == fmt.min_code) | (codes == fmt.max_code)
    levels = codes if zeros is None else codes - expand_scales(zeros, weight.shape[1])
    beyond = at_bound & ((weight / steps - levels).abs() > 0.5)
    expected = (factor.pivots.square() * steps[:, factor.order].square()).sum() / 12
    return LayerMetrics(
        output_error=float(quadratic_form(error, gram) / power),
        rtn_error=float(quadratic_form(dequantize(plain, scales, zeros).float() - weight, gram) / power),
        predicted_error=float(expected / power),
        weight_error=float(error.square().sum() / weight.square().sum().clamp_min(1e-30)),
        clip_rate=float(beyond.float().mean()),
        damping=factor.damping,
        damping_retries=factor.retries,
        dead_inputs=factor.dead_inputs,
        num_tokens=factor.num_tokens,
        seconds=0.0,
    )


def quadratic_form(error: Tensor, gram: Tensor) -> Tensor:
    """Trace of D H Dᵀ, the mean squared output of ``error`` on the tokens behind ``gram``."""
    return ((error @ gram) * error).sum()
