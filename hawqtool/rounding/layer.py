"""Round the layers of one input group by plan."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.model.gram import quadratic_form
from hawqtool.model.statistics import GroupStatistics
from hawqtool.model.timing import UNRECORDED, Recorder
from hawqtool.records import LayerMetrics, RoundedLayer
from hawqtool.rounding.asymmetric import best_shift, full_shift, gptaq_problem
from hawqtool.rounding.compensate import round_compensated
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.grid import Quantized, dequantize, expand_scales, nearest_codes, search_grid
from hawqtool.rounding.kernels import kernel_for
from hawqtool.rounding.refit import refit_scales

ROUNDINGS = ("rtn", "gptq", "foem", "gptaq")
BETAS = (0.0, 0.05, 0.1, 0.2, 0.4)
"""What ``auto`` chooses FOEM's β from."""


@dataclass(frozen=True)
class RoundingMethod:
    """How weights are rounded.

    Args:
        name: ``rtn``, ``gptq``, ``foem`` or ``gptaq``.
        beta: FOEM's β, or ``auto``: the one of `BETAS` with the least error on held-out rows, layer by layer; ignored
            by the others.
        both_signs: Allow negative scales on symmetric grids (see `search_scales`).
        damping: Fraction of the mean diagonal; None chooses by tokens per column.
        alpha: GPTAQ's α; ignored by the others.
        shift: Share of the target shift (see `full_shift`), 0 for none, or ``auto``: by held-out rows, layer by layer.
        refit: Refit the scales of each layer whose error on held-out rows that lowers.
    """

    name: str = "gptq"
    beta: float | Literal["auto"] = 0.1
    both_signs: bool = True
    damping: float | None = None
    alpha: float = 0.25
    shift: float | Literal["auto"] = 0.0
    refit: bool = False

    @property
    def feedback_beta(self) -> float | Literal["auto"]:
        """β of the column loop."""
        return self.beta if self.name == "foem" else 0.0

    @property
    def needs_drift(self) -> bool:
        """Whether it looks at the original model's inputs too."""
        return self.shift != 0 or (self.name == "gptaq" and self.alpha != 0)

    @property
    def needs_held_out(self) -> bool:
        """Whether it chooses settings on held-out rows."""
        return self.feedback_beta == "auto" or self.shift == "auto" or self.refit


@dataclass(frozen=True)
class Task:
    """One weight to round in one format: ``weight`` is ``[out, in]`` float32."""

    name: str
    weight: Tensor
    quant_format: QuantFormat
    stored_dtype: torch.dtype


@dataclass(frozen=True)
class LayerSettings:
    """What a layer is rounded with: β of the loop, share of the target shift, whether its scales are refitted."""

    beta: float = 0.0
    shift: float = 0.0
    refit: bool = False


def round_group(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None = None,
    recorder: Recorder = UNRECORDED,
) -> list[Quantized]:
    """Codes, scales and zero points of every task, in order; all share the inputs behind ``factor``.

    Grids are searched on what is rounded, the original weights or their shifted targets, and stay fixed (static
    groups). Compensated tasks of one β are stacked by rows and rounded in one loop.

    Args:
        tasks: The layers, each in its format; a layer may occur in several.
        factor: Factor of the Gram matrix of their inputs.
        method: Rounding method.
        statistics: What the factor came from; needed by methods that choose settings or look at the drift. Without a
            drift the inputs are the original's, and there is nothing to correct.
        recorder: Takes note of the scale search and the column loop.
    """
    settings = choose_settings(tasks, factor, method, statistics, recorder)
    return _round_with(tasks, factor, method, statistics, settings, recorder)


def choose_settings(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None,
    recorder: Recorder = UNRECORDED,
) -> list[LayerSettings]:
    """Settings of every task: those of the method, or what is best on the held-out rows after rounding by the others.

    Where the tokens are all of one kind nothing can be chosen, and what would be is left out: β and shift are 0.
    """
    beta, shift = method.feedback_beta, method.shift
    fixed = LayerSettings(0.0 if beta == "auto" else beta, 0.0 if shift == "auto" else shift)
    settings = [fixed] * len(tasks)
    if not method.needs_held_out:
        return settings
    if statistics is None:
        raise ValueError(f"rounding {method.name} chooses settings on held-out rows, but no statistics were given")
    fitting, held_out = statistics.fitting, statistics.held_out
    if fitting is None or held_out is None:
        return settings
    part = factorize(fitting.gram, fitting.num_tokens, factor.damping, name=tasks[0].name)
    if shift == "auto" and fitting.drift is not None:
        full = [full_shift(t.weight, fitting.drift, part) for t in tasks]
        settings = [
            replace(s, shift=best_shift(t.weight, whole, held_out))
            for t, s, whole in zip(tasks, settings, full, strict=True)
        ]
    if beta != "auto" and not method.refit:
        return settings
    problem = _prepare(tasks, part, method, fitting.drift, settings, recorder)
    betas = BETAS if beta == "auto" else (fixed.beta,)
    trials = [_round_targets(problem, [value] * len(tasks)) for value in betas]
    errors = torch.stack([_held_out_errors(tasks, trial, held_out) for trial in trials])
    chosen = errors.argmin(0).tolist()
    settings = [replace(s, beta=betas[choice]) for s, choice in zip(settings, chosen, strict=True)]
    if not method.refit:
        return settings
    best = [trials[choice][index] for index, choice in enumerate(chosen)]
    refitted = _held_out_errors(tasks, _refit(problem, best, fitting.gram), held_out)
    better = (refitted < errors.amin(0)).tolist()
    return [replace(s, refit=refit) for s, refit in zip(settings, better, strict=True)]


def _held_out_errors(tasks: Sequence[Task], results: Sequence[Quantized], statistics: GroupStatistics) -> Tensor:
    """Mean of (Q x - W x0)² of every task, less what does not depend on Q: ``[tasks]`` float32."""
    errors = []
    for task, result in zip(tasks, results, strict=True):
        error = dequantize(*result).float() - task.weight
        loss = quadratic_form(error, statistics.gram)
        if statistics.drift is not None:
            loss = loss - 2 * (error * (task.weight @ statistics.drift)).sum()
        errors.append(loss)
    return torch.stack(errors)


@dataclass(frozen=True)
class _Problem:
    """What the column loop gets.

    Args:
        tasks: The layers.
        targets: What is rounded, ``[out, in]`` each.
        aims: What the rounded weights shall be close to on the inputs, ``[out, in]`` each: the same but for GPTAQ,
            whose loop is given the rest of the correction as it goes.
        grids: Scales and zero points.
        factor: Factor with the feedback of the loop; its diagonal is that of the damped Gram matrix.
        recorder: Takes note of the loop.
    """

    tasks: Sequence[Task]
    targets: list[Tensor]
    aims: list[Tensor]
    grids: list[tuple[Tensor, Tensor | None]]
    factor: Factor
    recorder: Recorder


def _prepare(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    drift: Tensor | None,
    settings: Sequence[LayerSettings],
    recorder: Recorder,
) -> _Problem:
    """Targets, grids and feedback; the same tensors as without a correction where there is none."""
    targets, aims, feedback = [t.weight for t in tasks], [t.weight for t in tasks], factor
    if drift is not None and method.name == "gptaq" and method.alpha:
        solved = [gptaq_problem(t.weight, drift, factor, method.alpha) for t in tasks]
        targets, feedback = [target for target, _ in solved], solved[0][1]
        if method.refit:
            aims = [t.weight + method.alpha * full_shift(t.weight, drift, factor) for t in tasks]
    elif drift is not None:
        targets = aims = [
            t.weight + s.shift * full_shift(t.weight, drift, factor) if s.shift else t.weight
            for t, s in zip(tasks, settings, strict=True)
        ]
    with recorder.stage("scale search"):
        grids = [
            search_grid(target, factor.diagonal, t.quant_format, t.stored_dtype, method.both_signs)
            for target, t in zip(targets, tasks, strict=True)
        ]
    return _Problem(tasks, targets, aims, grids, feedback, recorder)


def _round_with(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None,
    settings: Sequence[LayerSettings],
    recorder: Recorder,
) -> list[Quantized]:
    """Every task by its settings."""
    problem = _prepare(tasks, factor, method, None if statistics is None else statistics.drift, settings, recorder)
    if method.name == "rtn":
        return [
            Quantized(nearest_codes(t.weight, scales, t.quant_format, zeros), scales, zeros)
            for t, (scales, zeros) in zip(tasks, problem.grids, strict=True)
        ]
    results = _round_targets(problem, [s.beta for s in settings])
    if not any(s.refit for s in settings) or statistics is None:
        return results
    refitted = _refit(problem, results, statistics.gram)
    return [new if s.refit else old for s, new, old in zip(settings, refitted, results, strict=True)]


def _round_targets(problem: _Problem, betas: Sequence[float]) -> list[Quantized]:
    """The column loop, once for each β that occurs."""
    results: dict[int, Quantized] = {}
    for beta in dict.fromkeys(betas):
        chosen = [index for index, value in enumerate(betas) if value == beta]
        tasks, grids = [problem.tasks[i] for i in chosen], [problem.grids[i] for i in chosen]
        weight = torch.cat([problem.targets[i] for i in chosen])
        heights = [len(t.weight) for t in tasks]
        with problem.recorder.stage("column loop"):
            codes = round_compensated(
                weight,
                torch.cat([expand_scales(scales, weight.shape[1]) for scales, _ in grids]),
                _per_row([t.quant_format.min_code for t in tasks], heights, weight),
                _per_row([t.quant_format.max_code for t in tasks], heights, weight),
                problem.factor,
                beta,
                zero=_stacked_zeros(grids, weight.shape[1]),
            )
        parts = zip(codes.split(heights), grids, strict=True)
        results |= {index: Quantized(part, *grid) for index, (part, grid) in zip(chosen, parts, strict=True)}
    return [results[index] for index in range(len(betas))]


def _refit(problem: _Problem, results: Sequence[Quantized], gram: Tensor) -> list[Quantized]:
    """Results with refitted scales."""
    damped = gram.clone()
    damped.diagonal().copy_(problem.factor.diagonal)
    return [refit_scales(result, aim, damped) for result, aim in zip(results, problem.aims, strict=True)]


def _stacked_zeros(grids: Sequence[tuple[Tensor, Tensor | None]], columns: int) -> Tensor | None:
    """Zero point of every weight of stacked tasks, ``[rows, in]`` float32; None where all are symmetric."""
    if all(zeros is None for _, zeros in grids):
        return None
    return torch.cat([expand_scales(torch.zeros_like(s) if z is None else z, columns) for s, z in grids])


def _per_row(values: Sequence[int], heights: Sequence[int], like: Tensor) -> Tensor:
    return torch.cat([like.new_full((h,), float(v)) for v, h in zip(values, heights, strict=True)])


def round_layers(
    tasks: Sequence[Task],
    statistics: GroupStatistics,
    factor: Factor,
    method: RoundingMethod,
    recorder: Recorder = UNRECORDED,
) -> list[RoundedLayer]:
    """Round an input group and measure what was lost.

    Args:
        tasks: The layers of the group, each in its planned format.
        statistics: Moments of their inputs over the rounding tokens.
        factor: Factor of the Gram matrix.
        method: Rounding method.
        recorder: Takes note of the scale search, the column loop and the losses.

    Raises:
        NumericalError: If a result is not finite; names the layer.
    """
    start, gram = time.perf_counter(), statistics.gram
    settings = choose_settings(tasks, factor, method, statistics, recorder)
    results = _round_with(tasks, factor, method, statistics, settings, recorder)
    if gram.is_cuda:
        torch.cuda.synchronize(gram.device)
    seconds = (time.perf_counter() - start) / len(tasks)
    # Brought to the host together: on a GPU each number fetched alone would wait for all work before it.
    with recorder.stage("losses"):
        losses = torch.stack([_losses(t, r, gram, factor) for t, r in zip(tasks, results, strict=True)]).tolist()
    kernel = None if method.name == "rtn" else kernel_for(gram.device)
    layers = []
    for task, result, values, chosen in zip(tasks, results, losses, settings, strict=True):
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
            beta=chosen.beta,
            target_shift=chosen.shift,
            scales_refitted=chosen.refit,
        )
        layers.append(RoundedLayer(task.name, task.quant_format, result.codes, result.scales, metrics, result.zeros))
    return layers


def quantized(layer: RoundedLayer) -> Quantized:
    """Codes, scales and zero points of a layer."""
    return Quantized(layer.codes, layer.scales, layer.zeros)


def with_codes(layer: RoundedLayer, result: Quantized, weight: Tensor) -> RoundedLayer:
    """The layer with other codes and scales; errors on outputs stay those of the rounding that came first.

    Args:
        layer: A rounded layer.
        result: What replaces its codes, scales and zero points.
        weight: ``[out, in]``, the weight that was rounded.
    """
    original = weight.float()
    error = (dequantize(*result).float() - original).square().sum() / original.square().sum().clamp_min(1e-30)
    clipped = _beyond(original, result, layer.quant_format).float().mean()
    values = torch.stack([error, clipped]).tolist()
    metrics = replace(layer.metrics, weight_error=values[0], clip_rate=values[1])
    return replace(layer, codes=result.codes, scales=result.scales, zeros=result.zeros, metrics=metrics)


def _beyond(weight: Tensor, result: Quantized, fmt: QuantFormat) -> Tensor:
    """Which weights lie more than half a step outside the grid: ``[out, in]`` bool."""
    codes, scales, zeros = result
    at_bound = (codes == fmt.min_code) | (codes == fmt.max_code)
    levels = codes if zeros is None else codes - expand_scales(zeros, weight.shape[1])
    return at_bound & ((weight / expand_scales(scales, weight.shape[1]) - levels).abs() > 0.5)


def _losses(task: Task, result: Quantized, gram: Tensor, factor: Factor) -> Tensor:
    """Output, plain rounding's, predicted and weight error, and clip rate: ``[5]`` float32 on the device."""
    weight, fmt = task.weight, task.quant_format
    _, scales, zeros = result
    error = dequantize(*result).float() - weight
    plain = nearest_codes(weight, scales, fmt, zeros)
    power = quadratic_form(weight, gram).clamp_min(1e-30)
    steps = expand_scales(scales, weight.shape[1])
    expected = (factor.pivots.square() * steps[:, factor.order].square()).sum() / 12
    return torch.stack(
        [
            quadratic_form(error, gram) / power,
            quadratic_form(dequantize(plain, scales, zeros).float() - weight, gram) / power,
            expected / power,
            error.square().sum() / weight.square().sum().clamp_min(1e-30),
            _beyond(weight, result, fmt).float().mean(),
        ]
    )
