"""What it changes when one unit of a quantized model takes another format: sensitivity at the plan itself."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.model.block import LoadedBlock
from hawqtool.records import MeasurementRows, UnitScores
from hawqtool.rounding.spec import RoundingErrors, RoundingSpec
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.measure import Progress, found_errors
from hawqtool.sensitivity.measured_kl import (
    CandidateStates,
    finite,
    load_scores,
    of_all_rows,
    run_blocks,
    save_scores,
)
from hawqtool.sensitivity.scores import mean_score
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.stream import ModelStream


def swap_divergence(
    original: ModelStream,
    quantized: ModelStream,
    rows: MeasurementRows,
    rounding: RoundingSpec,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
    ranks: Ranks = ALONE,
) -> UnitScores:
    """Change of the divergence from the original when one unit of a quantized model takes another format.

    Scores of single units at the original model leave out how rounding errors add up; these are differences at the
    plan, with everything else rounded as it is. The new weights are the original's, rounded with the Gram matrices of
    the quantized prefix. One unit costs, per format, a forward pass from its first block on. **All of the quantized
    model's blocks are on the device**. An output head keeps its format.

    Args:
        original: The original model.
        quantized: The model whose units are swapped.
        rows: Rows behind the rounding, and rows to measure on.
        rounding: Rounding that will be applied, with the formats to try, without a unit's present one; not refined.
        progress: Called with the phase, candidates done and candidates in all.
        saved: Keeps the scores after every block; what it has of the same arguments is not measured again.
        ranks: Processes that share the rows; the first one's store counts.

    Returns:
        ``[unit][format label]``: the new divergence less the present one, with its standard error; negative if better.
    """
    (done, scores), method, size = ranks.from_owner(load_scores(saved), 0), rounding.method, rows.batch_size
    share, scoring = ranks.share(len(rows.calibration.tokens)), rows.scoring[ranks.share(len(rows.scoring))]
    with quantized.keeping_pages(), ExitStack() as resident, torch.no_grad():
        blocks = [resident.enter_context(quantized.block(spec.index)) for spec in quantized.structure.blocks]
        needs = method.needs_held_out, method.needs_drift
        known = quantized.embed(rows.calibration.tokens[share], size, *needs, importance=rows.calibration.importance)
        known.ranks, known.first_row = ranks, share.start
        seen = quantized.embed(scoring, size)
        reference = original.final_hidden(scoring, size, lambda _: None)
        comparison = OutputComparison(original, quantized, scoring, reference)
        final = torch.cat(run_blocks(blocks, seen.calls, seen.hidden))
        present = finite("the plan", of_all_rows(ranks, comparison.divergences({"all": final})))["all"]
        candidates = CandidateStates(blocks, seen, quantized.structure.units, rounding.menu)
        for block in blocks:
            if block.spec.index >= done:
                with original.block(block.spec.index) as source:
                    changes = _changes(source, block, known, rounding)
                for unit, finals in candidates.of_block(block, changes):
                    divergences = finite(unit, of_all_rows(ranks, comparison.divergences(finals)))
                    scores[unit] = {label: mean_score(values - present) for label, values in divergences.items()}
                    progress("width swaps", sum(map(len, scores.values())), sum(map(len, rounding.menu.values())))
                if not candidates.carried:
                    save_scores(saved, block.spec.index + 1, scores)
            elif known.original is not None:
                with original.block(block.spec.index) as source:
                    advance(source, Activations(known.original, known.calls))
            advance(block, known)
            advance(block, seen)
    return scores


def _changes(source: LoadedBlock, block: LoadedBlock, known: Activations, rounding: RoundingSpec) -> RoundingErrors:
    """Per linear and format label, the newly rounded weight less the present one."""
    changes: RoundingErrors = {}
    errors = found_errors(rounding, source, group_statistics(block, known, block.spec.input_groups, source), known)
    for linear in (linear for linear in block.spec.linears if linear.name in errors):
        present = source.weight(linear) - block.weight(linear)
        changes[linear.name] = {label: error + present for label, error in errors.pop(linear.name).items()}
    if known.original is not None:
        advance(source, Activations(known.original, known.calls))
    return changes
