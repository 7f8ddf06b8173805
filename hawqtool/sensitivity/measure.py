"""Measure every unit in every format with one forward and one reverse sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.records import SWEEP_METRICS, BlockSpec, LinearSpec, MeasurementRows, Menu, Score, Unit, UnitScores
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.spec import InitialRoundings, InputGroup, InputGroups, RoundingErrors, RoundingSpec
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.backward import InputErrors, block_backward
from hawqtool.sensitivity.forward import Progress, forward_sweep, wanted_statistics
from hawqtool.sensitivity.gradient_limit import GRADIENT_LIMIT, GradientLimit
from hawqtool.sensitivity.label_gradients import head_rows, loss_gradients
from hawqtool.sensitivity.scores import (
    SIGNED,
    LayerRows,
    RowValues,
    add_rows,
    experts_together,
    mean_score,
    score_experts,
    score_rows,
    to_scores,
)
from hawqtool.streaming.block import Activations, check_states
from hawqtool.streaming.dealt import dealt
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.kept_roundings import KeptRoundings, Roundings
from hawqtool.streaming.offload import total_bytes
from hawqtool.streaming.resume_points import Pace
from hawqtool.streaming.stream import ModelStream

_SWEEP = "reverse-sweep"

Keeper = Callable[[Roundings], None]


def _keep_nothing(_: Roundings) -> None:
    """Whose roundings nobody wants."""


@dataclass(frozen=True)
class Measurement:
    """What the two sweeps give.

    Args:
        scores: ``[metric][unit][format label]``.
        projections: ``[unit][format label]``, a value per scoring row: see `hawqtool.sensitivity.scores.SIGNED`; empty
            where no metric but ``kron`` was wanted. The output head's labels are drawn apart, so its pair terms with
            the blocks have mean zero.
        error_norms: ‖D‖² by linear and format label, for scores that need no more of the rounding.
        input_fisher: Per unit the trace of the Fisher matrix with respect to its input x at all tokens, per output,
            E‖∂loss/∂x‖²: noise of variance σ² on x costs σ²/2 times it. This is HAWQ-V2's sensitivity of activations
            (Dong et al. 2020, section 3.3) with the Gauss-Newton matrix in place of the Hessian.
        shortened_rows: Scoring rows whose gradients were shortened (see `GradientLimit`).
        input_costs: By unit and format label, the part of every score that rounding inputs has.
    """

    scores: dict[str, UnitScores]
    projections: dict[str, dict[str, list[float]]]
    error_norms: dict[str, dict[str, float]]
    input_fisher: dict[str, Score]
    shortened_rows: int
    input_costs: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSettings:
    """Settings of the two sweeps.

    Args:
        seed: Seed of the sampled labels.
        gradient_limit: See `GradientLimit`; infinite for gradients as they are.
        metrics: Of those that one pair of sweeps gives, the ones wanted.
        ranks: Processes that share the rows; the leader has the measurement, the others what their rows gave.
        kept: Takes the roundings of every block, on every rank; None for nobody.
    """

    seed: int
    gradient_limit: float = GRADIENT_LIMIT
    metrics: Sequence[str] = SWEEP_METRICS
    ranks: Ranks = ALONE
    kept: KeptRoundings | None = None


def measure(
    stream: ModelStream,
    rows: MeasurementRows,
    rounding: RoundingSpec,
    settings: SweepSettings,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
) -> Measurement:
    """Scores of the original model, on other rows than it is rounded on: errors are 1.4 to 2 times larger there.

    Args:
        stream: The original model.
        rows: Rows behind rounding and scores.
        rounding: Rounding that will be applied, with the formats to score; an output head is not refined.
        settings: Labels, gradients and metrics.
        progress: Called with the phase, blocks done and blocks in all.
        saved: Keeps the reverse sweep by block, or now and then where that is much; one of equal arguments that was
            cut is gone on with, equal to the bit.
    """
    begun, method = saved.load(_SWEEP), replace(rounding.method, passes=1)  # more make all errors smaller alike
    pace, ranks, size, calibration = Pace(), settings.ranks, rows.batch_size, rows.calibration.tokens
    rounding, scoring = replace(rounding, method=method), rows.scoring[ranks.share(len(rows.scoring))]
    share = ranks.share(len(calibration))
    left = len(stream.structure.blocks) if begun is None else int(begun["left"])
    with stream.keeping_pages():
        known = stream.embed(calibration[share], size, method.needs_held_out, importance=rows.calibration.importance)
        known.ranks, known.first_row = ranks, share.start
        sets = (known, stream.embed(scoring, rows.scoring_batch))
        stored = forward_sweep(stream, *sets, left, rounding.menu, progress, rounding.refiner is not None)
        if begun is None:
            generator = torch.Generator(stream.device).manual_seed(ranks.seed(settings.seed))
            gradients, outputs = loss_gradients(stream, scoring.split(rows.scoring_batch), sets[1].hidden, generator)
            limit = GradientLimit.of(gradients, settings.gradient_limit)
            scores, positions = _Scores(list(settings.metrics), {}, {}, {}), sets[1].hidden[0].shape[1]
            rows_of_head = head_rows(stream, scoring, sets[1].hidden, ranks.seed(settings.seed))
            seen = LayerRows(rows_of_head, positions, outputs)
            _measure_head(stream, calibration[share], known, seen, rounding, scores)
        else:
            gradients, outputs = [gradient.to(stream.device) for gradient in begun["gradients"]], begun["outputs"]
            limit, scores = GradientLimit(**begun["limit"]), _Scores(**begun["scores"])
        for spec in reversed(stream.structure.blocks[:left]):
            left_here = stored.pop()
            sets[0].hidden, sets[1].hidden = left_here.calibration, left_here.scoring
            with stream.block(spec.index) as block:
                groups = left_here.statistics() or wanted_statistics(block, sets[0], rounding.menu)
                errors = found_errors(rounding, block, groups, sets[0], _keeper(settings, spec, stream))
                del left_here, groups
                inputs = InputErrors(_input_formats(spec, rounding.menu), {})
                layers, gradients = block_backward(block, sets[1], gradients, outputs, scores.input_power, inputs)
            gradients = limit.limited(gradients, ranks)
            check_states(gradients, f"the gradient at the input of block {spec.name}")
            scores.add_block(spec, layers, errors, known)
            scores.add_inputs(inputs, rounding.menu, outputs)
            if pace.is_due(total_bytes(gradients)):
                saved.save(_SWEEP, _state(spec.index, gradients, outputs, limit, scores))
            progress("reverse sweep", left - spec.index, left)
    shares = ranks.to_owner((scores, limit.shortened), 0) or [(scores, limit.shortened)]
    shortened = sum(count for _, count in shares)
    return _joined([part for part, _ in shares]).measurement(stream.structure.units, outputs, shortened)


def _keeper(settings: SweepSettings, spec: BlockSpec, stream: ModelStream) -> Keeper:
    kept = settings.kept
    return _keep_nothing if kept is None else lambda found: kept.keep(spec.index, found, stream.offload)


def found_errors(
    rounding: RoundingSpec,
    block: LoadedBlock,
    groups: InputGroups,
    known: Activations,
    keep: Keeper = _keep_nothing,
) -> RoundingErrors:
    """D by linear and format label of a block; where ranks share the rows, each rounds some of its groups.

    ``keep`` sees the roundings of all, on every rank.
    """
    if known.ranks.size == 1:
        with known.recorder.stage("roundings"):
            return rounding.block_errors(block, groups, known.hidden, lambda found: keep(_as_rounded(found)))

    def rounded(part: Sequence[InputGroup]) -> list[Roundings]:
        return [_as_rounded(found) for found in rounding.roundings_of(block, part)]

    errors, roundings = RoundingErrors(), Roundings()
    for group, found in dealt(known.ranks, groups, rounded, rounding.parts):
        roundings |= found
        for linear in (linear for linear in group if linear.name in found):
            weight, by_label = block.weight(linear), found[linear.name].items()
            errors[linear.name] = {label: dequantize(*value).float() - weight for label, value in by_label}
    keep(roundings)
    return errors


def _as_rounded(found: InitialRoundings) -> Roundings:
    return {name: {label: one.rounded for label, one in by_label.items()} for name, by_label in found.items()}


def _state(left: int, gradients: list[Tensor], outputs: int, limit: GradientLimit, scores: _Scores) -> dict[str, Any]:
    return {"left": left, "gradients": gradients, "outputs": outputs, "limit": vars(limit), "scores": vars(scores)}


def _input_formats(spec: BlockSpec, menu: Menu) -> dict[str, list[ActivationFormat]]:
    """How inputs of the units of a block may be rounded."""
    units = dict.fromkeys(linear.unit for linear in spec.linears)
    found = {unit: [fmt.activation_format for fmt in menu.get(unit, ())] for unit in units}
    return {unit: [kind for kind in dict.fromkeys(kinds) if kind is not None] for unit, kinds in found.items()}


@dataclass
class _Scores:
    """Scores that the reverse sweep has so far: row values and ‖∂loss/∂x‖² of a row by unit, ‖D‖² by linear.

    ``input_costs`` are the parts of the row values that rounding inputs has, by unit and format label.
    """

    metrics: list[str]
    unit_rows: dict[str, RowValues]
    input_power: dict[str, Tensor]
    error_norms: dict[str, dict[str, float]]
    input_costs: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(
        self,
        linears: Sequence[LinearSpec],
        layers: Sequence[LayerRows],
        errors: Sequence[Mapping[str, Tensor]],
        ranks: Ranks,
    ) -> None:
        """Add linears that share their input."""
        found = score_rows(layers, errors, self.metrics, ranks)
        for linear, values, by_label in zip(linears, found, errors, strict=True):
            add_rows(self.unit_rows.setdefault(linear.unit, {}), values)
            norms = {label: float(error.square().sum(dtype=torch.float64)) for label, error in by_label.items()}
            self.error_norms[linear.name] = norms

    def add_block(
        self, spec: BlockSpec, layers: dict[str, LayerRows], errors: dict[str, dict[str, Tensor]], known: Activations
    ) -> None:
        """Add the linears of a block that have errors, and forget what they saw; ``known`` has ranks and recorder."""
        with known.recorder.stage("scores"):
            self._add_block(spec, layers, errors, known.ranks)

    def _add_block(
        self, spec: BlockSpec, layers: dict[str, LayerRows], errors: dict[str, dict[str, Tensor]], ranks: Ranks
    ) -> None:
        experts: dict[object, list[list[LinearSpec]]] = {}
        for group in spec.input_groups:
            members = [linear for linear in group if linear.name in errors]
            if members and is_expert(members[0].name):
                form = tuple((m.unit, m.out_features, m.in_features) for m in members)
                experts.setdefault(form, []).append(members)
            elif members:
                self.add(members, [layers.pop(m.name) for m in members], [errors.pop(m.name) for m in members], ranks)
        for alike in experts.values():
            together = experts_together([errors[m.name] for m in alike[0]])
            for first in range(0, len(alike), together):
                self._add_experts(alike[first : first + together], layers, errors, ranks)

    def _add_experts(
        self,
        experts: Sequence[Sequence[LinearSpec]],
        layers: dict[str, LayerRows],
        errors: dict[str, dict[str, Tensor]],
        ranks: Ranks,
    ) -> None:
        """Add experts of one form, the linears of each that share its input."""
        seen = [[layers.pop(member.name) for member in members] for members in experts]
        own = [[errors.pop(member.name) for member in members] for members in experts]
        found = score_experts(seen, own, self.metrics, ranks)
        for index, values in enumerate(found):
            add_rows(self.unit_rows.setdefault(experts[0][index].unit, {}), values)
            stacked = [torch.stack(list(of_expert[index].values())) for of_expert in own]
            norms = torch.stack([e.square().sum((1, 2), dtype=torch.float64) for e in stacked]).tolist()
            for members, of_labels in zip(experts, norms, strict=True):
                self.error_norms[members[index].name] = dict(zip(own[0][index], of_labels, strict=True))

    def add_inputs(self, errors: InputErrors, menu: Menu, outputs: int) -> None:
        """Add to the scores of formats that round inputs what that costs, ½ Σ_t (J_t · dx_t)² per output.

        It is no matter of a metric, as nothing is estimated but the labels. What weights and inputs cost adds up: the
        product of the two changes has mean zero.
        """
        for unit, by_format in errors.found.items():
            costs = {activations: torch.cat(parts) / (2 * outputs) for activations, parts in by_format.items()}
            labels = {fmt.label: costs[fmt.activation_format] for fmt in menu[unit] if fmt.activation_format}
            if unit in self.unit_rows:
                add_rows(self.unit_rows[unit], {metric: labels for metric in self.metrics})
                self.input_costs[unit] = labels

    def measurement(self, units: Sequence[Unit], outputs: int, shortened_rows: int) -> Measurement:
        scores: dict[str, UnitScores] = {}
        projections: dict[str, dict[str, list[float]]] = {}
        for unit in units:
            values = self.unit_rows.get(unit.name, {})
            for metric, by_label in to_scores(values).items():
                scores.setdefault(metric, {})[unit.name] = by_label
            if SIGNED in values:
                projections[unit.name] = {label: rows.tolist() for label, rows in values[SIGNED].items()}
        power = {u.name: mean_score(self.input_power[u.name] / outputs) for u in units if u.name in self.unit_rows}
        costs = {unit: {n: mean_score(c) for n, c in found.items()} for unit, found in self.input_costs.items()}
        return Measurement(scores, projections, self.error_norms, power, shortened_rows, costs)


def _joined(shares: Sequence[_Scores]) -> _Scores:
    """Scores of the rows of several ranks, in their order."""
    if len(shares) == 1:
        return shares[0]
    rows: dict[str, RowValues] = {}
    for unit, values in shares[0].unit_rows.items():
        for metric, by_label in values.items():
            parts = {label: [share.unit_rows[unit][metric][label] for share in shares] for label in by_label}
            rows.setdefault(unit, {})[metric] = {label: torch.cat(values) for label, values in parts.items()}
    power = {unit: torch.cat([share.input_power[unit] for share in shares]) for unit in shares[0].input_power}
    costs = {
        unit: {label: torch.cat([share.input_costs[unit][label] for share in shares]) for label in labels}
        for unit, labels in shares[0].input_costs.items()
    }
    return _Scores(shares[0].metrics, rows, power, shares[0].error_norms, costs)


def rounding_errors(block: LoadedBlock, calibration: Activations, rounding: RoundingSpec) -> RoundingErrors:
    """D = Q(W) - W per linear and format label, rounded with the original model's Gram matrices.

    Args:
        block: The loaded block.
        calibration: The original's hidden states before the block.
        rounding: Rounding that will be applied.
    """
    groups = group_statistics(block, calibration, block.spec.input_groups)
    return found_errors(rounding, block, groups, calibration)


def head_errors(stream: ModelStream, calibration: Tensor, known: Activations, rounding: RoundingSpec) -> RoundingErrors:
    """Rounding errors of the output head; none where it is not quantized.

    Args:
        stream: The original model.
        calibration: Rows behind the rounding, those of this rank.
        known: Their hidden states after the last block.
        rounding: Rounding that will be applied, without its refiner.
    """
    head = stream.head
    if head is None:
        return {}
    groups = [(head.spec.linears, stream.head_statistics(calibration, known))]
    return found_errors(replace(rounding, refiner=None), head, groups, known)


def _measure_head(
    stream: ModelStream,
    calibration: Tensor,
    known: Activations,
    seen: LayerRows,
    rounding: RoundingSpec,
    scores: _Scores,
) -> None:
    """Add what there is of the output head's unit, nothing where it has no format to score, or is no linear."""
    head, errors = stream.head, head_errors(stream, calibration, known, rounding)
    for linear in head.spec.linears if head else ():
        if head and linear.name in errors:
            powers: list[Tensor] = []
            rows = _seeing_input_power(seen.rows, head.weight(linear), powers)
            layer = LayerRows(rows, seen.positions, seen.outputs)
            scores.add([linear], [layer], [errors[linear.name]], known.ranks)
            scores.input_power[linear.unit] = torch.stack(powers).cpu()


def _seeing_input_power(
    rows: Iterable[tuple[Tensor, Tensor]], weight: Tensor, powers: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows as they are, while ‖g W‖² of each is noted."""
    for x, g in rows:
        powers.append((g.float() @ weight).square().sum(dtype=torch.float64))
        yield x, g
