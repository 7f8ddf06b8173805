"""Measured divergence of the model with one unit quantized and all else original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.records import LinearSpec, MeasurementRows, Menu, Score, Unit, UnitScores
from hawqtool.rounding.spec import RoundingErrors, RoundingSpec
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.measure import Progress, head_errors, rounding_errors
from hawqtool.sensitivity.scores import mean_score
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.stream import ModelStream

_SCORES = "scores"


def single_unit_divergence(
    stream: ModelStream,
    rows: MeasurementRows,
    rounding: RoundingSpec,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
    ranks: Ranks = ALONE,
) -> UnitScores:
    """Divergence ``[unit][format label]`` from the original, with its standard error over rows.

    Nothing is expanded: Q(W) takes the place of W in all members of one unit, and the model is run. Q is the rounding
    that will be applied. A unit costs, per format, a forward pass from its first block on. **The whole model is on the
    device.** Below a floor that the dtype sets, a divergence is rounding noise, of either sign.

    Args:
        stream: The original model.
        rows: Rows behind the rounding, and rows to measure on.
        rounding: Rounding that will be applied, with the formats to measure; an output head is not refined.
        progress: Called with the phase, candidates done and candidates in all.
        saved: Keeps the scores after every block; what it has of the same arguments is not measured again.
        ranks: Processes that share the rows; the first one's store counts.

    Returns:
        Mean KL(original || candidate) in nats per output, or the relative squared error of the embedding.

    Raises:
        NumericalError: If a candidate's outputs are not finite.
    """
    done, scores = ranks.from_owner(load_scores(saved), 0)
    calibration, scoring = rows.calibration, rows.scoring[ranks.share(len(rows.scoring))]
    share = ranks.share(len(calibration.tokens))
    tokens = calibration.tokens[share]

    def keep(unit: str, found: dict[str, Score]) -> None:
        scores[unit] = found
        progress("single units", sum(map(len, scores.values())), sum(map(len, rounding.menu.values())))

    with stream.keeping_pages(), ExitStack() as resident, torch.no_grad():
        blocks = [resident.enter_context(stream.block(spec.index)) for spec in stream.structure.blocks]
        held_out = rounding.method.needs_held_out
        known = stream.embed(tokens, rows.batch_size, held_out, importance=calibration.importance)
        known.ranks, known.first_row = ranks, share.start
        seen = stream.embed(scoring, rows.batch_size)
        final = torch.cat(run_blocks(blocks, seen.calls, seen.hidden))
        comparison = OutputComparison(stream, stream, scoring, final)
        candidates = CandidateStates(blocks, seen, stream.structure.units, rounding.menu)
        for block in blocks:
            if block.spec.index >= done:
                for unit, finals in candidates.of_block(block, rounding_errors(block, known, rounding)):
                    keep(unit, unit_scores(unit, of_all_rows(ranks, comparison.divergences(finals))))
                if not candidates.carried:
                    save_scores(saved, block.spec.index + 1, scores)
            advance(block, known)
            advance(block, seen)
        errors = head_errors(stream, tokens, known, rounding)
        for linear in (stream.structure.linears[name] for name in errors):
            keep(linear.unit, head_scores(comparison, linear, errors[linear.name], ranks))
    return {unit.name: scores[unit.name] for unit in stream.structure.units if unit.name in scores}


def of_all_rows(ranks: Ranks, divergences: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divergence of every row by format label, from those of each rank's rows; on all ranks."""
    shares = ranks.everywhere(dict(divergences))
    return {label: torch.cat([share[label] for share in shares]) for label in divergences}


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


class CandidateStates:
    """Hidden states of a model in which one unit takes another format.

    Args:
        blocks: All blocks, loaded.
        seen: Hidden states of the model as it is, before the block that is asked for.
        units: Its units.
        menu: Formats to try by unit; units that are missing are skipped.

    Attributes:
        carried: Hidden states by batch, by unit and format label, of units that go on in later blocks, as experts may.
    """

    def __init__(self, blocks: Sequence[LoadedBlock], seen: Activations, units: Sequence[Unit], menu: Menu) -> None:
        self.blocks, self.seen, self.menu = blocks, seen, menu
        places = {unit.name: [m.block for m in unit.members] for unit in units if menu.get(unit.name)}
        self._spans = {name: (min(found), max(found)) for name, found in places.items()}
        self.carried: dict[tuple[str, str], list[Tensor]] = {}

    def of_block(self, block: LoadedBlock, errors: RoundingErrors) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Last hidden states ``[rows, positions, width]`` by format of each unit that ends in a block.

        Args:
            block: The block, which comes next after those that were asked for.
            errors: What is added to its weights, by linear and format label.
        """
        index = block.spec.index
        for unit, (_, last) in ((u, span) for u, span in self._spans.items() if span[0] <= index <= span[1]):
            members, finals = [linear.name for linear in block.spec.linears if linear.unit == unit], {}
            for label in (fmt.label for fmt in self.menu[unit]):
                hidden = self.carried.pop((unit, label), list(self.seen.hidden))
                with block.with_weights(block.shifted({name: errors[name][label] for name in members})):
                    hidden = run_blocks([block], self.seen.calls, hidden)
                if last > index:
                    self.carried[unit, label] = hidden
                else:
                    finals[label] = torch.cat(run_blocks(self.blocks[index + 1 :], self.seen.calls, hidden))
            if finals:
                yield unit, finals


def run_blocks(
    blocks: Sequence[LoadedBlock], calls: Sequence[Sequence[BlockCall]], states: Sequence[Tensor]
) -> list[Tensor]:
    """Hidden states behind some blocks, batch by batch, from those before them."""
    states = list(states)
    for block in blocks:
        states = [block.run(state, calls[batch][block.spec.index]) for batch, state in enumerate(states)]
    return states


def head_scores(
    comparison: OutputComparison, linear: LinearSpec, errors: Mapping[str, Tensor], ranks: Ranks = ALONE
) -> dict[str, Score]:
    """Scores of the output head's linear, from its rounding errors by format label."""
    head = comparison.candidate.head
    assert head is not None  # the caller saw to it
    divergences = comparison.divergences(
        dict.fromkeys(errors, comparison.states),
        lambda label: head.with_weights(head.shifted({linear.name: errors[label]})),
    )
    return unit_scores(linear.unit, of_all_rows(ranks, divergences))


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
