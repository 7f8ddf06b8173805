"""How much each calibration token counts where layers are rounded, and the moments behind output feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.memory_budget import Work, importance_offload, importance_rows
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.stages import refine
from hawqtool.records import OutputMoments, Rows, TokenImportance
from hawqtool.rounding.grid import searches
from hawqtool.rounding.kernels.dispatch import compile_ahead
from hawqtool.rounding.statistics import is_held_out
from hawqtool.sensitivity.output_moments import FITTING, HELD_OUT, LEFT_OUT, OutputMomentSums
from hawqtool.sensitivity.token_importance import Portions, token_importance

_KEY, MOMENTS = "token-importance", "output-moments"
"""Keys of what is saved; under the second one every rank keeps the moments, each of which one of them has made."""

_KERNELS = "kernels"
"""Key of kernels that are compiled ahead."""

_CPU_BYTES = 2 << 30
"""Most bytes of hidden states that are kept together where no limit was given."""


def with_token_importance(context: RunContext, rows: Rows, for_feedback: bool = False) -> Rows:
    """The calibration rows with the importance of their tokens, where the configuration wants them and they have none.

    Args:
        context: The run, whose store keeps it.
        rows: Calibration rows.
        for_feedback: Whether a plan is going to be carried out on the rows, with output feedback and refinement by what
            errors cost the loss where these are on.
    """
    job = context.job
    if not job.settings.uses_token_importance or rows.importance is not None:
        return rows
    layers = job.feedback_layers | refine.weighted_blocks(job) if for_feedback else frozenset()
    importance, known = context.saved.load(_KEY), context.saved.load(MOMENTS) if layers else {}
    if importance is not None and known is not None:
        moments = {name: OutputMoments(**values) for name, values in known.items()}
        return replace(rows, importance=importance, output_moments=moments)
    asked = rows.tokens, sorted(layers)
    sharing = context.shared(_importance, *asked)
    importance, found = _importance(sharing, *asked, context.progress("token importance"))
    context.save(context.saved, _KEY, dict(importance), sum(values.nbytes for values in importance.values()))
    if layers:
        size = sum(m.lower.nbytes for m in found.values() if m.lower is not None)
        context.save(context.saved, MOMENTS, {name: dict(vars(m)) for name, m in found.items()}, size)
    return replace(rows, importance=importance, output_moments=found)


def _importance(
    job: Job, tokens: torch.Tensor, layers: Sequence[str], progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[TokenImportance, dict[str, OutputMoments]]:
    """Importance of all rows for the leader, of which each rank takes a share, and moments of some layers or blocks."""
    compile_kernels(job)
    kinds, blocks = _kinds(job, len(tokens)), refine.weighted_blocks(job).intersection(layers)
    names = frozenset(layers) - blocks
    sums = OutputMomentSums(names, kinds, job.settings.method.needs_held_out, job.ranks, blocks)
    work = Work(job.config, job.index, job.structure, job.device, job.dtype, *tokens.shape[:2])
    batch_size = importance_rows(work, job.settings.batch_size, job.row_format.values is None)
    job = replace(job, offload=importance_offload(work, batch_size, job.offload))
    portions = Portions(
        batch_size,
        _CPU_BYTES if job.offload is None else job.offload.memory_bytes,
        job.ranks,
    )
    moments = sums if layers else None
    found = token_importance(job.stream(), tokens, portions, job.config.seed, progress, moments=moments)
    if job.ranks.size > 1:
        job.ranks.kept[MOMENTS] = sums.finished
    return found, sums.finished


def compile_kernels(job: Job) -> None:
    """Begin to compile the kernels that rounding on a GPU will need, once, while the host waits for something else."""
    if job.device.type == "cuda" and job.settings.uses_token_importance:
        job.ahead.begin(_KERNELS, partial(_compile_ahead, job))


def _compile_ahead(job: Job) -> None:
    menu, symmetric = job_menu(job, None), job.config.symmetric
    inputs = [(fmt, m.in_features) for unit in job.units for fmt in menu[unit.name] for m in unit.members]
    widths = sorted({fmt.group_width(columns) for fmt, columns in inputs if fmt.is_plain and not fmt.is_unquantized})
    compile_ahead(job.device, not symmetric, widths, searches(symmetric, job.settings.method.both_signs))


def _kinds(job: Job, count: int) -> torch.Tensor:
    """What each row is to the moments, ``[rows]`` int64: rows that learning holds out are for nothing else to see."""
    kinds = torch.full((count,), LEFT_OUT)
    kept = ~refine.is_held_out(count) if job.config.learns else torch.ones(count, dtype=torch.bool)
    kinds[kept] = torch.where(is_held_out(torch.arange(int(kept.sum()))), HELD_OUT, FITTING)
    return kinds
