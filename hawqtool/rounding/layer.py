"""Round the layers of one input group by plan."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.model.timing import UNRECORDED, Recorder
from hawqtool.records import LayerMetrics, RoundedLayer
from hawqtool.rounding.compensate import round_compensated
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.grid import Quantized, dequantize, expand_scales, nearest_codes, search_grid
from hawqtool.rounding.kernels import kernel_for

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


def round_group(
    tasks: Sequence[Task], factor: Factor, method: RoundingMethod, recorder: Recorder = UNRECORDED
) -> list[Quantized]:
    """Codes, scales and zero points of every task, in order; all share the inputs behind ``factor``.

    Grids are searched on the original weights and stay fixed (static groups). Compensated tasks are stacked
    by rows and rounded in one loop.
    """
    both = method.both_signs
    with recorder.stage("scale search"):
        grids = [search_grid(t.weight, factor.diagonal, t.quant_format, t.stored_dtype, both) for t in tasks]
    if method.name == "rtn":
        return [
            Quantized(nearest_codes(t.weight, scales, t.quant_format, zeros), scales, zeros)
            for t, (scales, zeros) in zip(tasks, grids, strict=True)
        ]
    heights = [len(t.weight) for t in tasks]
    weight = torch.cat([t.weight for t in tasks])
    step = torch.cat([expand_scales(scales, weight.shape[1]) for scales, _ in grids])
    with recorder.stage("column loop"):
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


def round_layers(
    tasks: Sequence[Task], gram: Tensor, factor: Factor, method: RoundingMethod, recorder: Recorder = UNRECORDED
) -> list[RoundedLayer]:
    """Round an input group and measure what was lost.

    Args:
        tasks: The layers of the group, each in its planned format.
        gram: ``[in, in]`` float32, mean of x xᵀ over the rounding tokens.
        factor: Its factor.
        method: Rounding method.
        recorder: Takes note of the scale search, the column loop and the losses.

    Raises:
        NumericalError: If a result is not finite; names the layer.
    """
    start = time.perf_counter()
    results = round_group(tasks, factor, method, recorder)
    if gram.is_cuda:
        torch.cuda.synchronize(gram.device)
    seconds = (time.perf_counter() - start) / len(tasks)
    # Brought to the host together: on a GPU each number fetched alone would wait for all work before it.
    with recorder.stage("losses"):
        losses = torch.stack([_losses(t, r, gram, factor) for t, r in zip(tasks, results, strict=True)]).tolist()
    kernel = None if method.name == "rtn" else kernel_for(gram.device)
    layers = []
    for task, result, values in zip(tasks, results, losses, strict=True):
        output_error, rtn_error, predicted_error, weight_error, clip_rate = values
        if not (math.isfinite(output_error) and math.isfinite(weight_error)):
            raise NumericalError(
                f"{task.name}: rounding gave values that are not finite; check this weight for NaN or Inf"
            )
        metrics = LayerMetrics(
            output_error=output_error,
            rtn_error=rtn_error,
            predicted_error=predicted_error,
            weight_error=weight_error,
            clip_rate=clip_rate,
            damping=factor.damping,
            damping_retries=factor.retries,
            dead_inputs=factor.dead_inputs,
            num_tokens=factor.num_tokens,
            seconds=seconds,
            kernel=kernel,
        )
        layers.append(RoundedLayer(task.name, task.quant_format, result.codes, result.scales, metrics, result.zeros))
    return layers


def _losses(task: Task, result: Quantized, gram: Tensor, factor: Factor) -> Tensor:
    """Output, plain rounding's, predicted and weight error, and clip rate: ``[5]`` float32 on the device."""
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
    return torch.stack(
        [
            quadratic_form(error, gram) / power,
            quadratic_form(dequantize(plain, scales, zeros).float() - weight, gram) / power,
            expected / power,
            error.square().sum() / weight.square().sum().clamp_min(1e-30),
            beyond.float().mean(),
        ]
    )


def quadratic_form(error: Tensor, gram: Tensor) -> Tensor:
    """Trace of D H Dᵀ, the mean squared output of ``error`` on the tokens behind ``gram``."""
    return ((error @ gram) * error).sum()
