"""The two-pass scale search: grids, the column loop, grids for what the loop met, and the loop again.

Layers are stacked by rows, and each row keeps its best. More than two passes gain little (see `PASSES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hawqtool.rounding.factor import Factor
from hawqtool.rounding.floats.elements import ELEMENTS
from hawqtool.rounding.gptq import RowGrids, round_compensated, row_losses, targets_at_turn
from hawqtool.rounding.grid import Quantized, dequantize, expand_scales, search_grid, search_grids
from hawqtool.rounding.input_drift import full_shift, gptaq_problem, solved_shift
from hawqtool.rounding.method import Grid, LayerSettings, RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.stage_timer import Recorder


@dataclass(frozen=True)
class Problem:
    """What the column loop gets.

    Args:
        tasks: The layers.
        targets: What is rounded, ``[out, in]`` each.
        goals: What the rounded weights shall be close to on the inputs, ``[out, in]`` each: the same but for GPTAQ,
            whose loop is given the rest of the correction as it goes.
        grids: Scales and zero points; none where blocks of rows get their own.
        costs: ``[in]``, what a squared error costs in each column to the search of grids.
        both_signs: Whether scales may be negative.
        passes: How often grids are searched and the loop is run: two in the two-pass scale search.
        factor: Factor with the feedback of the loop; its diagonal is that of the damped Gram matrix.
        recorder: Takes note of the searches and the loop.
        paper_form: Whether FOEM's loop is that of its paper.
    """

    tasks: Sequence[Task]
    targets: list[Tensor]
    goals: list[Tensor]
    grids: list[Grid]
    costs: Tensor
    both_signs: bool
    passes: int
    factor: Factor
    recorder: Recorder
    paper_form: bool = False

    def search(self, task: Task, target: Tensor) -> Grid:
        """Grid of a layer for other values than the targets."""
        with self.recorder.stage("scale search"):
            grid = task.quant_format, task.stored_dtype, self.both_signs, task.divisor
            return search_grid(target, self.costs, *grid)


def prepare(
    tasks: Sequence[Task],
    factor: Factor,
    method: RoundingMethod,
    statistics: GroupStatistics | None,
    settings: Sequence[LayerSettings],
    recorder: Recorder,
) -> Problem:
    """Targets and feedback, without grids; where there is no correction the tensors are as they were."""
    drift = None if statistics is None else statistics.drift
    targets, goals, feedback = [t.weight for t in tasks], [t.weight for t in tasks], factor
    if drift is not None and method.name == "gptaq" and method.alpha:
        solved = [gptaq_problem(t.weight, drift, factor, method.alpha) for t in tasks]
        targets, feedback = [target for target, _ in solved], solved[0][1]
        if method.refit:
            goals = [t.weight + method.alpha * full_shift(t.weight, drift, factor) for t in tasks]
    elif statistics is not None and statistics.output_drift is not None:
        # Of a linear alone: whatever its formats, it is shifted by one share.
        shift = settings[0].shift * solved_shift(statistics.output_drift, factor)
        targets = goals = [t.weight + shift for t in tasks]
    elif drift is not None:
        targets = goals = [
            t.weight + s.shift * full_shift(t.weight, drift, factor) if s.shift else t.weight
            for t, s in zip(tasks, settings, strict=True)
        ]
    # What an error costs: all of it in plain rounding, else what later columns leave of it. But that is the loss of
    # the Gram matrix only, and where all tokens count alike a few huge ones rule it: fitted so closely to them, the
    # model got worse (SmolLM2, 48 x 512 tokens: KL from 0.490 to 0.562).
    fits = statistics is not None and statistics.weighted and method.compensates
    costs = factor.conditional if fits else factor.diagonal
    passes, signs = method.passes if fits else 1, method.both_signs
    return Problem(tasks, targets, goals, [], costs, signs, passes, feedback, recorder, method.paper_form)


def with_grids(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with grids for their targets; layers of one shape and format are searched together."""
    alike: dict[object, list[tuple[int, int]]] = {}
    for number, problem in enumerate(problems):
        for index, task in enumerate(problem.tasks):
            form = task.weight.shape, task.quant_format, task.stored_dtype, problem.both_signs
            alike.setdefault(form, []).append((number, index))
    grids: list[dict[int, Grid]] = [{} for _ in problems]
    for places in alike.values():
        first = problems[places[0][0]]
        task = first.tasks[places[0][1]]
        with first.recorder.stage("scale search"):
            found = search_grids(
                [problems[n].targets[i] for n, i in places],
                [problems[n].costs for n, _ in places],
                task.quant_format,
                task.stored_dtype,
                first.both_signs,
                [problems[n].tasks[i].divisor for n, i in places],
            )
        for (number, index), grid in zip(places, found, strict=True):
            grids[number][index] = grid
    return [
        replace(problem, grids=[of_task[index] for index in range(len(problem.tasks))])
        for problem, of_task in zip(problems, grids, strict=True)
    ]


def round_targets(problem: Problem, betas: Sequence[float]) -> list[Quantized]:
    """The column loop, once for each β that occurs and each pass."""
    results: dict[int, Quantized] = {}
    for beta in dict.fromkeys(betas):
        chosen = [index for index, value in enumerate(betas) if value == beta]
        tasks = [problem.tasks[i] for i in chosen]
        targets = torch.cat([problem.targets[i] for i in chosen])
        grids, again = [problem.grids[i] for i in chosen], problem.passes > 1 and beta < 1
        column_errors = torch.empty_like(targets.t(), memory_format=torch.contiguous_format) if again else None
        best = _looped(problem, tasks, targets, grids, beta, column_errors)
        if column_errors is not None:
            best = _searched_again(problem, tasks, targets, best, beta, column_errors)
        results |= dict(zip(chosen, best, strict=True))
    return [results[index] for index in range(len(betas))]


def _searched_again(
    problem: Problem, tasks: Sequence[Task], targets: Tensor, first: list[Quantized], beta: float, column_errors: Tensor
) -> list[Quantized]:
    """Each row's best of further passes, whose grids are searched on what the pass before rounded.

    ``column_errors`` holds the errors of the first pass.
    """
    heights = [len(task.weight) for task in tasks]
    best = latest = first
    least = _row_losses(problem, tasks, targets, first, beta, column_errors)
    for _ in range(problem.passes - 1):
        with problem.recorder.stage("column loop"):
            rounded = _loop_values(latest)
            met = targets_at_turn(targets, rounded, column_errors, problem.factor, beta)
        grids = [problem.search(task, target) for task, target in zip(tasks, met.split(heights), strict=True)]
        latest = _looped(problem, tasks, targets, grids, beta, column_errors)
        losses = _row_losses(problem, tasks, targets, latest, beta, column_errors)
        better = (losses < least).split(heights)
        best = [_merged(rows, new, old) for rows, new, old in zip(better, latest, best, strict=True)]
        least = torch.minimum(losses, least)
    return best


def _looped(
    problem: Problem,
    tasks: Sequence[Task],
    targets: Tensor,
    grids: Sequence[Grid],
    beta: float,
    column_errors: Tensor | None,
) -> list[Quantized]:
    """The column loop over stacked tasks, one kind of codes after the other; writes its errors where there is room."""
    kinds = [None if task.quant_format.floats is None else task.quant_format.floats.element for task in tasks]
    if len(set(kinds)) == 1:
        return _looped_alike(problem, tasks, targets, grids, beta, column_errors)
    heights = [len(task.weight) for task in tasks]
    parts, errors = targets.split(heights), None if column_errors is None else column_errors.split(heights, 1)
    found: dict[int, Quantized] = {}
    for kind in dict.fromkeys(kinds):
        alike = [index for index, value in enumerate(kinds) if value == kind]
        own = None if errors is None else torch.cat([errors[i] for i in alike], 1)
        stacked = torch.cat([parts[i] for i in alike])
        rounded = _looped_alike(problem, [tasks[i] for i in alike], stacked, [grids[i] for i in alike], beta, own)
        found |= dict(zip(alike, rounded, strict=True))
        if own is not None and errors is not None:
            for index, part in zip(alike, own.split([heights[i] for i in alike], 1), strict=True):
                errors[index].copy_(part)
    return [found[index] for index in range(len(tasks))]


def _looped_alike(
    problem: Problem,
    tasks: Sequence[Task],
    targets: Tensor,
    grids: Sequence[Grid],
    beta: float,
    column_errors: Tensor | None,
) -> list[Quantized]:
    """The column loop over stacked tasks with one kind of codes, integers or an element of floats."""
    heights, groups = [len(task.weight) for task in tasks], max(scales.shape[1] for scales, _ in grids)
    floats = tasks[0].quant_format.floats
    with problem.recorder.stage("column loop"):
        stacked = RowGrids(
            torch.cat([expand_scales(scales, groups) for scales, _ in grids]),
            _per_row([t.quant_format.min_code for t in tasks], heights, targets),
            _per_row([t.quant_format.max_code for t in tasks], heights, targets),
            _stacked_zeros(grids, groups),
            None if floats is None else ELEMENTS[floats.element],
        )
        codes = round_compensated(
            targets, stacked, problem.factor, beta, column_errors=column_errors, paper_form=problem.paper_form
        )
    results = zip(tasks, codes.split(heights), grids, strict=True)
    return [Quantized(part, *grid, task.divisor) for task, part, grid in results]


def _row_losses(
    problem: Problem,
    tasks: Sequence[Task],
    targets: Tensor,
    results: Sequence[Quantized],
    beta: float,
    column_errors: Tensor,
) -> Tensor:
    """Every row's damped loss, ``[rows]``; GPTAQ's is that of the columns at their turn, for its other feedback.

    It is of the values that the loop took: rounding them to the stored dtype adds as much in every pass.
    """
    with problem.recorder.stage("column loop"):
        if beta == 0:
            losses = column_errors.square().sum(0)
        else:
            losses = row_losses(targets, _loop_values(results), problem.factor)
    return _shared_losses(tasks, losses)


def _shared_losses(tasks: Sequence[Task], losses: Tensor) -> Tensor:
    """Losses of rows; those of rows that share a scale, which are kept or replaced together, are their sum."""
    shared = [1 if t.quant_format.floats is None else t.quant_format.floats.group_rows for t in tasks]
    if max(shared) == 1:
        return losses
    parts = zip(losses.split([len(t.weight) for t in tasks]), shared, strict=True)
    return torch.cat([part.view(-1, rows).sum(1).repeat_interleave(rows) for part, rows in parts])


def _loop_values(results: Sequence[Quantized]) -> Tensor:
    """Values of the grids as the column loop sees them, ``[rows, in]`` float32: not rounded to the stored dtype."""
    return torch.cat([dequantize(codes, scales.float(), zeros) for codes, scales, zeros, _ in results])


def _merged(rows: Tensor, new: Quantized, old: Quantized) -> Quantized:
    """The rows that are marked from one result, the others from another."""
    rows = rows[:, None]
    zeros = None if new.zeros is None or old.zeros is None else torch.where(rows, new.zeros, old.zeros)
    # As bytes: few operations on a GPU know floats of one byte.
    codes = torch.where(rows, new.codes.view(torch.int8), old.codes.view(torch.int8)).view(old.codes.dtype)
    return Quantized(codes, torch.where(rows, new.scales, old.scales), zeros, old.divisor)


def refit(problem: Problem, results: Sequence[Quantized], gram: Tensor) -> list[Quantized]:
    """Results with refitted scales."""
    damped = gram.clone()
    damped.diagonal().copy_(problem.factor.diagonal)
    return [refit_scales(result, goal, damped) for result, goal in zip(results, problem.goals, strict=True)]


def refit_scales(rounded: Quantized, target: Tensor, gram: Tensor) -> Quantized:
    """The same codes with scales that lower tr(D H Dᵀ), D = Q - target, one group after the other.

    The error is a parabola in each scale: with L the codes less their zeros, the best change of s of a row and group g
    is ``-[L_g (H Dᵀ)_g] / [L_g H_gg L_gᵀ]``. It is cast to the stored dtype, and taken where the error falls even so;
    D then has it before the next group's turn. Rows are independent.

    Args:
        rounded: Codes, scales and zero points.
        target: ``[out, in]`` float32, what the rounded weights approximate.
        gram: ``[in, in]`` float32, H, damped.
    """
    codes, scales, zeros, divisor = rounded
    groups = scales.shape[1]
    width = codes.shape[1] // groups
    error = dequantize(*rounded).float() - target
    found = scales.clone()
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        zero = None if zeros is None else zeros[:, group : group + 1]
        levels = codes[:, part].float() if zero is None else codes[:, part].float() - zero.float()
        pull, block = error @ gram[:, part], gram[part, part]
        slope, curvature = (pull * levels).sum(1), ((levels @ block) * levels).sum(1)
        old = scales[:, group]
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        scale = (old.float() - step).to(old.dtype)
        # The products are rounded as well, so the gain is measured on the weights that loaders compute.
        change = dequantize(codes[:, part], scale.unsqueeze(1), zero).float() - target[:, part] - error[:, part]
        gain = 2 * (pull * change).sum(1) + ((change @ block) * change).sum(1)
        # A scale keeps its sign, and is never zero.
        better = (gain < 0) & torch.isfinite(scale) & (scale.sign() == old.sign())
        found[:, group] = torch.where(better, scale, old)
        error[:, part] += torch.where(better.unsqueeze(1), change, 0.0)
    return Quantized(codes, found, zeros, divisor)


def _stacked_zeros(grids: Sequence[Grid], groups: int) -> Tensor | None:
    """Zero points of stacked tasks, ``[rows, groups]`` float32; None where all are symmetric."""
    if all(zeros is None for _, zeros in grids):
        return None
    return torch.cat([expand_scales(torch.zeros_like(s) if z is None else z, groups) for s, z in grids])


def _per_row(values: Sequence[int], heights: Sequence[int], like: Tensor) -> Tensor:
    return torch.cat([like.new_full((h,), float(v)) for v, h in zip(values, heights, strict=True)])
