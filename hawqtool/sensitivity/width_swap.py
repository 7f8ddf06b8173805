"""What it changes when one unit of a quantized model takes another format: sensitivity at the plan itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.records import BlockSpec, Menu, Rows, UnitScores
from hawqtool.rounding.method import RoundingMethod
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.measure import Progress, group_errors
from hawqtool.sensitivity.measured_kl import (
    Carried,
    finite,
    joined,
    load_scores,
    run_blocks,
    save_scores,
    unit_finals,
)
from hawqtool.sensitivity.scores import mean_score
from hawqtool.streaming.block import Activations, advance, read_weight
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.stream import ModelStream


def swap_divergence(
    original: ModelStream,
    quantized: ModelStream,
    calibration: Rows,
    scoring: Tensor,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    batch_size: int,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
) -> UnitScores:
    """Change of the divergence from the original when one unit of a quantized model takes another format.

    Scores of single units at the original model leave out how rounding errors add up; these are differences at the
    plan, with everything else rounded as it is. The new weights are the original's, rounded with the Gram matrices of
    the quantized prefix. One unit costs, per format, a forward pass from its first block on. **All of the quantized
    model's blocks are on the device**. An output head keeps its format.

    Args:
        original: The original model.
        quantized: The model whose units are swapped.
        calibration: Rows behind the rounding.
        scoring: Rows to measure on: ``[rows, seq_len]`` tokens, or images.
        menu: Unit to the formats to try, without its present one.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        batch_size: Rows per forward pass.
        progress: Called with the phase, candidates done and candidates in all.
        saved: Keeps the scores after every block; what it has of the same arguments is not measured again.

    Returns:
        ``[unit][format label]``: the new divergence less the present one, with its standard error; negative if better.
    """
    done, scores = load_scores(saved)
    with quantized.keeping_pages(), ExitStack() as resident, torch.no_grad():
        modules = [resident.enter_context(quantized.block(spec.index)) for spec in quantized.structure.blocks]
        needs = method.needs_held_out, method.needs_drift
        known = quantized.embed(calibration.tokens, batch_size, *needs, weights=calibration.weights)
        seen = quantized.embed(scoring, batch_size)
        reference = original.final_hidden(scoring, batch_size, lambda _: None)
        comparison, carried = OutputComparison(original, quantized, scoring, reference), Carried()
        final = torch.cat(run_blocks(modules, seen.calls, list(seen.hidden), 0))
        present = finite("the plan", comparison.divergences({"all": final}))["all"]
        for spec, block in zip(quantized.structure.blocks, modules, strict=True):
            if spec.index >= done:
                with original.block(spec.index) as source:
                    errors = _changes(source, block, spec, known, menu, method, stored_dtypes)
                for unit, finals in unit_finals(quantized, modules, spec, seen, errors, menu, carried):
                    changed = finite(unit, comparison.divergences(joined(finals)))
                    scores[unit] = {label: mean_score(values - present) for label, values in changed.items()}
                    progress("swaps", sum(map(len, scores.values())), sum(map(len, menu.values())))
                if not carried:
                    save_scores(saved, spec.index + 1, scores)
            elif known.original is not None:
                with original.block(spec.index) as source:
                    advance(source, spec, Activations(known.original, known.calls))
            advance(block, spec, known)
            advance(block, spec, seen)
    return scores


def _changes(
    source: nn.Module,
    block: nn.Module,
    spec: BlockSpec,
    known: Activations,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> dict[str, dict[str, Tensor]]:
    """Per linear and format label, the newly rounded weight less the present one."""
    changes: dict[str, dict[str, Tensor]] = {}
    for group, statistics in group_statistics(block, spec, known, spec.input_groups, source):
        errors = group_errors(source, spec, group, statistics, menu, method, stored_dtypes)
        for linear in (linear for linear in group if linear.name in errors):
            present = read_weight(source, spec, linear) - read_weight(block, spec, linear)
            changes[linear.name] = {label: error + present for label, error in errors[linear.name].items()}
    if known.original is not None:
        advance(source, spec, Activations(known.original, known.calls))
    return changes
