"""Measured divergence of the model with one unit quantized and all else original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.model.replay import Call
from hawqtool.records import BlockSpec, LinearSpec, Menu, Rows, Score, UnitScores
from hawqtool.rounding.method import RoundingMethod
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.measure import Progress, Refiner, group_errors, rounding_errors
from hawqtool.sensitivity.scores import mean_score
from hawqtool.streaming.block import Activations, advance, read_weight, replace_weight, run_block
from hawqtool.streaming.stream import ModelStream

_SCORES = "scores"
Carried = dict[tuple[str, str], list[Tensor]]
"""Unit and format label to hidden states, batch by batch."""


def single_unit_divergence(
    stream: ModelStream,
    calibration: Rows,
    scoring: Tensor,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    batch_size: int,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
    refiner: Refiner | None = None,
) -> UnitScores:
    """Divergence ``[unit][format label]`` from the original, with its standard error over rows.

    Nothing is expanded: Q(W) takes the place of W in all members of one unit, and the model is run. Q is the rounding
    that will be applied. A unit costs, per format, a forward pass from its first block on. **The whole model is on the
    device.** Below a floor that the dtype sets, a divergence is rounding noise, of either sign.

    Args:
        stream: The original model.
        calibration: Rows behind the rounding.
        scoring: Rows to measure on: ``[rows, seq_len]`` tokens, or images.
        menu: Unit to the formats to measure; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        batch_size: Rows per forward pass.
        progress: Called with the phase, candidates done and candidates in all.
        saved: Keeps the scores after every block; what it has of the same arguments is not measured again.
        refiner: Improves the roundings of every block; an output head's stay as they are.

    Returns:
        Mean KL(original || candidate) in nats per output, or the relative squared error of the embedding.

    Raises:
        NumericalError: If a candidate's outputs are not finite.
    """
    (done, scores), rounding = load_scores(saved), (menu, method, stored_dtypes)

    def keep(unit: str, found: dict[str, Score]) -> None:
        scores[unit] = found
        progress("single units", sum(map(len, scores.values())), sum(map(len, menu.values())))

    with stream.keeping_pages(), ExitStack() as resident, torch.no_grad():
        modules = [resident.enter_context(stream.block(spec.index)) for spec in stream.structure.blocks]
        known = stream.embed(calibration.tokens, batch_size, method.needs_held_out, weights=calibration.weights)
        seen = stream.embed(scoring, batch_size)
        final = torch.cat(run_blocks(modules, seen.calls, list(seen.hidden), 0))
        comparison, carried = OutputComparison(stream, stream, scoring, final), Carried()
        for spec, block in zip(stream.structure.blocks, modules, strict=True):
            if spec.index >= done:
                errors = rounding_errors(block, spec, known, *rounding, refiner)
                for unit, finals in unit_finals(stream, modules, spec, seen, errors, menu, carried):
                    keep(unit, unit_scores(unit, comparison.divergences(joined(finals))))
                if not carried:
                    save_scores(saved, spec.index + 1, scores)
            advance(block, spec, known)
            advance(block, spec, seen)
        for unit, found in _head_scores(comparison, calibration.tokens, known, *rounding):
            keep(unit, found)
    return {unit.name: scores[unit.name] for unit in stream.structure.units if unit.name in scores}


def _head_scores(
    comparison: OutputComparison,
    calibration: Tensor,
    known: Activations,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, dict[str, Score]]]:
    """Scores of the output head's unit, where there is one that has formats to measure."""
    stream, head = comparison.candidate, comparison.candidate.structure.head
    if head is None:
        return
    statistics = stream.head_statistics(calibration, known)
    errors = group_errors(stream.model, head, head.linears, statistics, menu, method, stored_dtypes)
    for linear in (linear for linear in head.linears if linear.name in errors):
        yield linear.unit, head_scores(comparison, linear, errors[linear.name])


def load_scores(saved: Saved) -> tuple[int, UnitScores]:
    """Leading blocks whose units were scored before an interruption, and the scores."""
    known = saved.load(_SCORES)
    if known is None:
        return 0, {}
    return known["blocks"], scores_of_pairs(known["scores"])


def save_scores(saved: Saved, blocks: int, scores: UnitScores) -> None:
    """Keep the scores of the units of leading blocks; to be called when no unit goes on beyond them."""
    saved.save(_SCORES, {"blocks": blocks, "scores": pairs_of_scores(scores)})


def pairs_of_scores(scores: UnitScores) -> dict[str, dict[str, tuple[float, float]]]:
    """Scores as JSON holds them: ``[unit][label]``, each a value with its standard error."""
    return {u: {n: (score.value, score.stderr) for n, score in found.items()} for u, found in scores.items()}


def scores_of_pairs(pairs: Mapping[str, Mapping[str, Sequence[float]]]) -> UnitScores:
    """Inverse of `pairs_of_scores`."""
    return {u: {n: Score(*pair) for n, pair in found.items()} for u, found in pairs.items()}


def unit_finals(
    stream: ModelStream,
    modules: Sequence[nn.Module],
    spec: BlockSpec,
    seen: Activations,
    errors: Mapping[str, Mapping[str, Tensor]],
    menu: Menu,
    carried: Carried,
) -> Iterator[tuple[str, dict[str, list[Tensor]]]]:
    """Last hidden states by format of each unit that ends in a block.

    A unit that goes on in later blocks, as experts may, has the states of its formats in ``carried`` until then.
    """
    for unit, last in _open_units(stream, menu, spec.index).items():
        members = [linear for linear in spec.linears if linear.unit == unit]
        finals = {}
        for label in (fmt.label for fmt in menu[unit]):
            hidden = carried.pop((unit, label), list(seen.hidden))
            with replaced(modules[spec.index], spec, {linear: errors[linear.name][label] for linear in members}):
                hidden = run_blocks(modules, seen.calls, hidden, spec.index, spec.index + 1)
            if last > spec.index:
                carried[unit, label] = hidden
            else:
                finals[label] = run_blocks(modules, seen.calls, hidden, spec.index + 1)
        if finals:
            yield unit, finals


def _open_units(stream: ModelStream, menu: Menu, index: int) -> dict[str, int]:
    """Units to measure that begin at or before a block and end at or after it, with the last block of each."""
    spans = {u.name: [m.block for m in u.members] for u in stream.structure.units if menu.get(u.name)}
    return {name: max(span) for name, span in spans.items() if min(span) <= index <= max(span)}


def run_blocks(
    modules: Sequence[nn.Module],
    calls: Sequence[Sequence[Call]],
    states: list[Tensor],
    first: int,
    end: int | None = None,
) -> list[Tensor]:
    """Hidden states after blocks ``first`` to ``end`` (exclusive; None: all), batch by batch."""
    for index in range(first, len(modules) if end is None else end):
        states = [run_block(modules[index], state, calls[p][index]) for p, state in enumerate(states)]
    return states


@contextmanager
def replaced(block: nn.Module, spec: BlockSpec, errors: Mapping[LinearSpec, Tensor]) -> Iterator[None]:
    """While the context lasts, the weights are W + D; afterwards they are W to the bit."""
    originals = {linear: read_weight(block, spec, linear).clone() for linear in errors}
    try:
        for linear, error in errors.items():
            replace_weight(block, spec, linear, originals[linear] + error)
        yield
    finally:
        for linear, weight in originals.items():
            replace_weight(block, spec, linear, weight)


def head_scores(comparison: OutputComparison, linear: LinearSpec, errors: Mapping[str, Tensor]) -> dict[str, Score]:
    """Scores of the output head's linear, from its rounding errors by format label."""
    stream = comparison.candidate
    head = stream.structure.head
    assert head is not None  # the caller saw to it
    found = comparison.divergences(
        dict.fromkeys(errors, comparison.states), lambda label: replaced(stream.model, head, {linear: errors[label]})
    )
    return unit_scores(linear.unit, found)


def unit_scores(unit: str, divergences: Mapping[str, Tensor]) -> dict[str, Score]:
    """Scores of one unit from the divergence of every row by format label.

    Raises:
        NumericalError: If a candidate's outputs are not finite.
    """
    return {label: mean_score(rows) for label, rows in finite(unit, divergences).items()}


def finite(name: str, divergences: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Divergences by format label, after checking that they are finite.

    Raises:
        NumericalError: Otherwise; says ``name`` and the label.
    """
    for label, rows in divergences.items():
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError(f"{name} at {label}: the model gives outputs that are NaN or Inf")
    return divergences


def joined(finals: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Last hidden states ``[rows, positions, width]`` by format label, from those of batches."""
    return {label: torch.cat(list(batches)) for label, batches in finals.items()}
