"""Round the layers of one input group by plan."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.records import LayerMetrics, OutputMoments, RoundedLayer
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.floats.elements import ELEMENTS
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.grid import (
    Quantized,
    clip_rate,
    codes_of_steps,
    dequantize,
    expand_scales,
    nearest_codes,
    search_grid,
)
from hawqtool.rounding.input_drift import best_shift, full_shift, held_out_errors
from hawqtool.rounding.kernels.dispatch import kernel_for
from hawqtool.rounding.method import BETAS, LayerSettings, RoundingMethod, Task, TaskGroup
from hawqtool.rounding.output_feedback import RowFeedback, round_row_blocks, row_feedback, unpack_lower
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.rounding.two_pass import Problem, prepare, refit, round_targets, with_grids
from hawqtool.runtime.stage_timer import UNRECORDED, Recorder


def round_group(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None = None,
    recorder: Recorder = UNRECORDED,
) -> list[Quantized]:
    """Codes, scales and zero points of every task, in order; all share the inputs behind ``factor``.

    Grids are searched on what is rounded, the original weights or their shifted targets, and stay fixed (static
    groups); where tokens count by importance, they are searched again on what the columns had become. Compensated tasks
    of one β are stacked by rows and rounded in one loop.

    Args:
        tasks: The layers, each in its format; a layer may occur in several.
        factor: Factor of the Gram matrix of their inputs.
        method: Rounding method.
        statistics: What the factor came from; needed by methods that choose settings or look at the drift. Without a
            drift the inputs are the original's, and there is nothing to correct.
        recorder: Takes note of the scale search and the column loop.
    """
    return round_groups([TaskGroup(tasks, factor, statistics)], method, recorder)[0]


def round_groups(
    groups: Sequence[TaskGroup], method: RoundingMethod, recorder: Recorder = UNRECORDED
) -> list[list[Quantized]]:
    """`round_group` for several groups, to the bit; those of one form, such as experts, are searched together."""
    settings = [choose_settings(g.tasks, g.factor, method, g.statistics, recorder) for g in groups]
    return _round_with(groups, method, settings, recorder)


def choose_settings(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None,
    recorder: Recorder = UNRECORDED,
    moments: OutputMoments | None = None,
) -> list[LayerSettings]:
    """Settings of every task: those of the method, or what is best on the held-out rows after rounding by the others.

    Where the tokens are all of one kind nothing can be chosen, and what would be is left out: β and shift are 0. With
    output feedback the error is tr(S E H Eᵀ), both of the held-out rows: the plain one grows where the loss falls.
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
    shifts = shift == "auto" and fitting.drift is not None
    if not shifts and beta != "auto" and not method.refit:
        return settings
    part = factorize(fitting.gram, fitting.num_tokens, factor.damping, name=tasks[0].name)
    rows, across = _held_out_feedback(moments, fitting.gram.device)
    if shifts and fitting.drift is not None:
        full = [full_shift(t.weight, fitting.drift, part) for t in tasks]
        settings = [
            replace(s, shift=best_shift(t.weight, whole, held_out, across))
            for t, s, whole in zip(tasks, settings, full, strict=True)
        ]
    if beta != "auto" and not method.refit:
        return settings
    problem = prepare(tasks, part, method, fitting, settings, recorder)
    if rows is None:
        (problem,) = with_grids([problem])
    betas = BETAS if beta == "auto" else (fixed.beta,)
    trials = [_looped(problem, [value] * len(tasks), rows) for value in betas]
    errors = torch.stack([held_out_errors(tasks, trial, held_out, across) for trial in trials])
    chosen = errors.argmin(0).tolist()
    settings = [replace(s, beta=betas[choice]) for s, choice in zip(settings, chosen, strict=True)]
    if not method.refit:
        return settings
    best = [trials[choice][index] for index, choice in enumerate(chosen)]
    again = _refitted(problem, best, [s.beta for s in settings], fitting.gram, rows)
    refitted = held_out_errors(tasks, again, held_out, across)
    better = (refitted < errors.amin(0)).tolist()
    return [replace(s, refit=refit) for s, refit in zip(settings, better, strict=True)]


def _held_out_feedback(moments: OutputMoments | None, device: torch.device) -> tuple[RowFeedback | None, Tensor | None]:
    """Feedback of the rows that are not held out, and the others' S ``[out, out]``; None where there is none."""
    rows = None if moments is None else row_feedback(moments, device, fitting=True)
    if rows is None or moments is None or moments.held_out is None:
        return None, None
    return rows, unpack_lower(moments.held_out, device)


def _looped(problem: Problem, betas: Sequence[float], rows: RowFeedback | None) -> list[Quantized]:
    """The column loop over all tasks; with output feedback over each alone, by blocks of rows."""
    if rows is None:
        return round_targets(problem, betas)
    singles = zip(problem.tasks, problem.targets, betas, strict=True)
    return [
        round_row_blocks(replace(problem, tasks=[task], targets=[target]), beta, rows) for task, target, beta in singles
    ]


def _refitted(
    problem: Problem, results: Sequence[Quantized], betas: Sequence[float], gram: Tensor, rows: RowFeedback | None
) -> list[Quantized]:
    """Results with refitted scales; with output feedback later rows have to hear of that, so it is part of the loop."""
    if rows is None:
        return refit(problem, results, gram)
    singles = zip(problem.tasks, problem.targets, betas, strict=True)
    return [
        round_row_blocks(replace(problem, tasks=[task], targets=[target]), beta, rows, gram)
        for task, target, beta in singles
    ]


def _round_with(
    groups: Sequence[TaskGroup],
    method: RoundingMethod,
    settings: Sequence[Sequence[LayerSettings]],
    recorder: Recorder,
    rows: RowFeedback | None = None,
) -> list[list[Quantized]]:
    """Every task of each group by its settings; what is given stays as it is."""
    pairs = list(zip(groups, settings, strict=True))
    open_ = [(group, own) for group, own in pairs if any(task.given is None for task in group.tasks)]
    problems = [prepare(*group[:2], method, group.statistics, own, recorder) for group, own in open_]
    if rows is None:
        problems = with_grids(problems)
    found = (_carried_out(p, g.statistics, method, own, rows) for p, (g, own) in zip(problems, open_, strict=True))
    return [
        next(found) if any(task.given is None for task in group.tasks) else [t.given for t in group.tasks if t.given]
        for group in groups
    ]


def _carried_out(
    problem: Problem,
    statistics: GroupStatistics | None,
    method: RoundingMethod,
    settings: Sequence[LayerSettings],
    rows: RowFeedback | None,
) -> list[Quantized]:
    """Results of a group whose targets and grids are known."""
    tasks = problem.tasks
    if method.name == "rtn":
        return [
            t.given or Quantized(nearest_codes(t.weight, scales, t.quant_format, zeros), scales, zeros, t.divisor)
            for t, (scales, zeros) in zip(tasks, problem.grids, strict=True)
        ]
    betas = [s.beta for s in settings]
    results = _looped(problem, betas, rows)
    if any(s.refit for s in settings) and statistics is not None:
        refitted = _refitted(problem, results, betas, statistics.gram, rows)
        results = [new if s.refit else old for s, new, old in zip(settings, refitted, results, strict=True)]
    return [task.given or result for task, result in zip(tasks, results, strict=True)]


def round_layers(
    tasks: Sequence[Task],
    statistics: GroupStatistics,
    factor: Factor,
    method: RoundingMethod,
    recorder: Recorder = UNRECORDED,
    moments: OutputMoments | None = None,
) -> list[RoundedLayer]:
    """Round an input group and measure what was lost.

    Args:
        tasks: The layers of the group, each in its planned format.
        statistics: Moments of their inputs over the rounding tokens.
        factor: Factor of the Gram matrix.
        method: Rounding method.
        recorder: Takes note of the scale search, the column loop and the losses.
        moments: Second moments of the gradients at their outputs, for output feedback; None without it. Layers that
            share them are one layer in several formats.

    Raises:
        NumericalError: If a result is not finite; names the layer.
    """
    return round_layer_groups([TaskGroup(tasks, factor, statistics)], method, recorder, moments)[0]


def round_layer_groups(
    groups: Sequence[TaskGroup],
    method: RoundingMethod,
    recorder: Recorder = UNRECORDED,
    moments: OutputMoments | None = None,
) -> list[list[RoundedLayer]]:
    """`round_layers` for several groups, to the bit; those of one form, such as experts, are searched together.

    With output feedback there is one group.
    """
    start, device = time.perf_counter(), groups[0].factor.upper.device
    tasks = [task for group in groups for task in group.tasks]
    moments = None if any(shares_rows(task.quant_format) for task in tasks) else moments
    with recorder.stage("factor"):
        rows = None if moments is None else row_feedback(moments, device)
    settings = [choose_settings(g.tasks, g.factor, method, g.statistics, recorder, moments) for g in groups]
    results = _round_with(groups, method, settings, recorder, rows)
    # Brought to the host together: on a GPU each number fetched alone would wait for all work before it.
    with recorder.stage("losses"):
        losses = [
            _losses(task, result, group.statistics.gram, group.factor)
            for group, found in zip(groups, results, strict=True)
            for task, result in zip(group.tasks, found, strict=True)
            if group.statistics is not None
        ]
        values = iter(torch.stack(losses).tolist())
    seconds = (time.perf_counter() - start) / len(tasks)  # a GPU is done only now, and was not waited for before
    kernel = None if method.name == "rtn" else kernel_for(device)
    layers = []
    for (own, factor, _), found, chosen in zip(groups, results, settings, strict=True):
        measured = [_metrics(task, next(values), factor, chosen[i]) for i, task in enumerate(own)]
        measured = [replace(m, seconds=seconds, kernel=kernel) for m in measured]
        with_feedback = [_with_feedback(m, moments, rows) for m in measured]
        layers.append(
            [
                RoundedLayer(task.name, task.quant_format, metrics=metrics, **result._asdict())
                for task, metrics, result in zip(own, with_feedback, found, strict=True)
            ]
        )
    return layers


def _metrics(task: Task, values: Sequence[float], factor: Factor, chosen: LayerSettings) -> LayerMetrics:
    """Metrics from the `_losses` of a layer.

    Raises:
        NumericalError: If they are not finite; names the layer.
    """
    output_error, rtn_error, predicted_error, weight_error, clip_rate = values
    if not (math.isfinite(output_error) and math.isfinite(weight_error)):
        raise _not_finite(task.name)
    return LayerMetrics(
        output_error=output_error,
        rtn_error=rtn_error,
        predicted_error=predicted_error,
        weight_error=weight_error,
        clip_rate=clip_rate,
        damping=factor.damping,
        damping_retries=factor.retries,
        dead_inputs=factor.dead_inputs,
        num_tokens=factor.num_tokens,
        seconds=0.0,
        beta=chosen.beta,
        target_shift=chosen.shift,
        scales_refitted=chosen.refit,
        copied=task.given is not None,
    )


def shares_rows(fmt: QuantFormat) -> bool:
    """Whether rows share a scale, so that they cannot be rounded in an order of their own."""
    return fmt.floats is not None and fmt.floats.group_rows > 1


def _with_feedback(metrics: LayerMetrics, moments: OutputMoments | None, rows: RowFeedback | None) -> LayerMetrics:
    """Metrics with what they say of output feedback, where there is any."""
    if moments is None:
        return metrics
    if rows is None:
        return replace(metrics, feedback_ratio=moments.ratio)
    damping, blocks = rows.factor.damping, len(rows.blocks)
    return replace(metrics, feedback_ratio=moments.ratio, feedback_damping=damping, feedback_blocks=blocks)


def round_without_inputs(tasks: Sequence[Task], method: RoundingMethod) -> list[RoundedLayer]:
    """Round weights to nearest by themselves: scales minimise the squared error of the weights.

    Nothing is known of the outputs, so that their errors are None.

    Args:
        tasks: Layers, each in its planned format.
        method: Plain rounding.

    Raises:
        NumericalError: If a result is not finite; names the layer.
    """
    layers = []
    for task in tasks:
        start, weight, fmt = time.perf_counter(), task.weight, task.quant_format
        alike = weight.new_ones(weight.shape[1])
        scales, zeros = search_grid(weight, alike, fmt, task.stored_dtype, method.both_signs, task.divisor)
        result = task.given or Quantized(nearest_codes(weight, scales, fmt, zeros), scales, zeros, task.divisor)
        metrics = LayerMetrics(
            output_error=None,
            rtn_error=None,
            predicted_error=None,
            weight_error=0.0,
            clip_rate=0.0,
            damping=0.0,
            damping_retries=0,
            dead_inputs=0,
            num_tokens=0,
            seconds=time.perf_counter() - start,
            copied=task.given is not None,
        )
        unmeasured = RoundedLayer(task.name, fmt, metrics=metrics, **result._asdict())
        layer = with_codes(unmeasured, result, weight)
        if not math.isfinite(layer.metrics.weight_error):
            raise _not_finite(task.name)
        layers.append(layer)
    return layers


def _not_finite(name: str) -> NumericalError:
    return NumericalError(f"{name}: rounding gave values that are not finite; check this weight for NaN or Inf")


def quantized(layer: RoundedLayer) -> Quantized:
    """Codes, scales, zero points and divisor of a layer."""
    return Quantized(layer.codes, layer.scales, layer.zeros, layer.divisor)


def with_codes(layer: RoundedLayer, result: Quantized, weight: Tensor) -> RoundedLayer:
    """The layer with other codes and scales; errors on outputs stay those of the rounding that came first.

    Args:
        layer: A rounded layer.
        result: What replaces its codes, scales and zero points.
        weight: ``[out, in]``, the weight that was rounded.
    """
    original = weight.float()
    error = (dequantize(*result).float() - original).square().sum() / original.square().sum().clamp_min(1e-30)
    in_steps = original / expand_scales(result.scales, original.shape[1])
    clipped = clip_rate(in_steps, result, layer.quant_format)
    values = torch.stack([error, clipped]).tolist()
    metrics = replace(layer.metrics, weight_error=values[0], clip_rate=values[1])
    return replace(layer, metrics=metrics, **result._asdict())


def _losses(task: Task, result: Quantized, gram: Tensor, factor: Factor) -> Tensor:
    """Output, plain rounding's, predicted and weight error, and clip rate: ``[5]`` float32 on the device."""
    weight, fmt = task.weight, task.quant_format
    scales, zeros = result.scales, result.zeros
    error = dequantize(*result).float().sub_(weight)
    in_steps = weight / expand_scales(scales, weight.shape[1])
    clipped = clip_rate(in_steps, result, fmt)
    plain = dequantize(codes_of_steps(in_steps, fmt, zeros), scales, zeros).float().sub_(weight)
    power = quadratic_form(weight, gram, coarse=True).clamp_min(1e-30)
    if fmt.floats is None:
        steps = expand_scales(scales.float().square().sum(0, keepdim=True), weight.shape[1])[0]
    else:
        spacing = ELEMENTS[fmt.floats.element].spacing(result.codes.float().abs())
        steps = spacing.mul_(expand_scales(scales, weight.shape[1])).square_().sum(0)
    expected = (factor.pivots.square() * steps[factor.order]).sum() / 12
    return torch.stack(
        [
            quadratic_form(error, gram, coarse=True) / power,
            quadratic_form(plain, gram, coarse=True) / power,
            expected / power,
            error.square().sum() / weight.square().sum().clamp_min(1e-30),
            clipped,
        ]
    )
