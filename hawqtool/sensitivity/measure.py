"""Measure every unit in every format with one forward and one reverse sweep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hawqtool.records import SWEEP_METRICS, BlockSpec, LinearSpec, Menu, Rows, Score, Unit, UnitScores
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.learned.fake_quant import InitialRounding
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.backward import block_backward
from hawqtool.sensitivity.forward import Progress, forward_sweep, wanted_statistics
from hawqtool.sensitivity.gradient_limit import GRADIENT_LIMIT, GradientLimit
from hawqtool.sensitivity.label_gradients import head_rows, loss_gradients
from hawqtool.sensitivity.scores import SIGNED, LayerRows, RowValues, add_rows, mean_score, score_rows, to_scores
from hawqtool.streaming.block import Activations, check_states, read_weight
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.stream import ModelStream

_SWEEP = "reverse-sweep"

InitialRoundings = dict[str, dict[str, InitialRounding]]
"""Rounded layers by linear and format label."""


class Refiner(Protocol):
    """Improves the roundings of a block, each format by itself, as refinement will."""

    def __call__(
        self, block: nn.Module, spec: BlockSpec, hidden: Sequence[Tensor], starts: InitialRoundings
    ) -> InitialRoundings:
        """Roundings that take the place of ``starts``.

        Args:
            block: The loaded block of the original model; it stays as it is.
            spec: Its structure.
            hidden: The original's hidden states before the block on all calibration rows, by batch.
            starts: What rounding gave.
        """


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
    """

    scores: dict[str, UnitScores]
    projections: dict[str, dict[str, list[float]]]
    error_norms: dict[str, dict[str, float]]
    input_fisher: dict[str, Score]
    shortened_rows: int


def measure(
    stream: ModelStream,
    calibration: Rows,
    scoring: Tensor,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    batch_size: int,
    seed: int,
    progress: Progress,
    saved: Saved = NOTHING_SAVED,
    gradient_limit: float = GRADIENT_LIMIT,
    refiner: Refiner | None = None,
    metrics: Sequence[str] = SWEEP_METRICS,
) -> Measurement:
    """Scores of the original model, on other rows than it is rounded on: errors are 1.4 to 2 times larger there.

    Args:
        stream: The original model.
        calibration: Rows behind the rounding.
        scoring: Rows behind the scores, ``[rows, seq_len]`` tokens, or images; disjoint from ``calibration``.
        menu: Unit to the formats to score; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        batch_size: Rows per forward pass.
        seed: Seed of the sampled labels.
        progress: Called with the phase, blocks done and blocks in all.
        saved: Keeps the reverse sweep by block; one of equal arguments that was cut is gone on with, equal to the bit.
        gradient_limit: See `GradientLimit`; infinite for gradients as they are.
        refiner: Improves the roundings of every block before they are scored; an output head's stay as they are.
        metrics: Of those that one pair of sweeps gives, the ones wanted.
    """
    begun, method = saved.load(_SWEEP), replace(method, passes=1)  # more make all errors smaller alike
    left = len(stream.structure.blocks) if begun is None else int(begun["left"])
    with stream.keeping_pages():
        known = stream.embed(calibration.tokens, batch_size, method.needs_held_out, weights=calibration.weights)
        sets = (known, stream.embed(scoring, batch_size))
        stored = forward_sweep(stream, *sets, left, menu, progress, keeps_states=refiner is not None)
        if begun is None:
            generator = torch.Generator(stream.device).manual_seed(seed)
            gradients, outputs = loss_gradients(stream, scoring.split(batch_size), sets[1].hidden, generator)
            growth, found = GradientLimit.of(gradients, gradient_limit), _Found(list(metrics), {}, {}, {})
            seen = LayerRows(head_rows(stream, scoring, sets[1].hidden, seed), sets[1].hidden[0].shape[1], outputs)
            _measure_head(stream, calibration.tokens, known, seen, menu, method, stored_dtypes, found)
        else:
            gradients, outputs = [gradient.to(stream.device) for gradient in begun["gradients"]], begun["outputs"]
            growth, found = GradientLimit(**begun["growth"]), _Found(**begun["found"])
        for spec in reversed(stream.structure.blocks[:left]):
            left_here = stored.pop()
            sets[0].hidden, sets[1].hidden = left_here.calibration, left_here.scoring
            with stream.block(spec.index) as block:
                groups = left_here.statistics() or wanted_statistics(block, spec, sets[0], menu)
                errors = _errors(block, spec, groups, menu, method, stored_dtypes, refiner, sets[0].hidden)
                del left_here, groups
                layers, gradients = block_backward(block, spec, sets[1], gradients, outputs, found.input_power)
            check_states(gradients := growth.limited(gradients), f"the gradient at the input of block {spec.name}")
            found.add_block(spec, layers, errors)
            saved.save(_SWEEP, _state(spec.index, gradients, outputs, growth, found))
            progress("reverse sweep", left - spec.index, left)
    return found.measurement(stream.structure.units, outputs, growth.shortened)


def _state(left: int, gradients: list[Tensor], outputs: int, growth: GradientLimit, found: _Found) -> dict[str, Any]:
    return {"left": left, "gradients": gradients, "outputs": outputs, "growth": vars(growth), "found": vars(found)}


@dataclass
class _Found:
    """What the reverse sweep has found of the metrics: row values and ‖∂loss/∂x‖² of a row by unit, ‖D‖² by linear."""

    metrics: list[str]
    unit_rows: dict[str, RowValues]
    input_power: dict[str, Tensor]
    error_norms: dict[str, dict[str, float]]

    def add(
        self, linears: Sequence[LinearSpec], layers: Sequence[LayerRows], errors: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add linears that share their input."""
        for linear, values, by_label in zip(linears, score_rows(layers, errors, self.metrics), errors, strict=True):
            add_rows(self.unit_rows.setdefault(linear.unit, {}), values)
            norms = {label: float(error.square().sum(dtype=torch.float64)) for label, error in by_label.items()}
            self.error_norms[linear.name] = norms

    def add_block(self, spec: BlockSpec, layers: dict[str, LayerRows], errors: dict[str, dict[str, Tensor]]) -> None:
        """Add the linears of a block that have errors, and forget what they saw."""
        for group in spec.input_groups:
            members = [linear for linear in group if linear.name in errors]
            if members:
                self.add(members, [layers.pop(m.name) for m in members], [errors.pop(m.name) for m in members])

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
        return Measurement(scores, projections, self.error_norms, power, shortened_rows)


def rounding_errors(
    block: nn.Module,
    spec: BlockSpec,
    calibration: Activations,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    refiner: Refiner | None = None,
) -> dict[str, dict[str, Tensor]]:
    """D = Q(W) - W per linear and format label, rounded with the original model's Gram matrices.

    Args:
        block: The loaded block.
        spec: Its structure.
        calibration: The original's hidden states before the block.
        menu: Unit to the formats to round to; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        refiner: Improves the roundings.

    Returns:
        ``[linear][format label]``, each ``[out, in]`` float32.
    """
    groups = group_statistics(block, spec, calibration, spec.input_groups)
    return _errors(block, spec, groups, menu, method, stored_dtypes, refiner, calibration.hidden)


def _errors(
    block: nn.Module,
    spec: BlockSpec,
    groups: Iterable[tuple[Sequence[LinearSpec], GroupStatistics]],
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    refiner: Refiner | None,
    hidden: Sequence[Tensor],
) -> dict[str, dict[str, Tensor]]:
    """D of some input groups ``[linear][format label]``; a refiner needs the hidden states before the block."""
    starts: InitialRoundings = {}
    for group, statistics in groups:
        starts |= _group_starts(block, spec, group, statistics, menu, method, stored_dtypes)
    return _as_errors(starts if refiner is None else refiner(block, spec, hidden, starts))


def _as_errors(starts: InitialRoundings) -> dict[str, dict[str, Tensor]]:
    """D ``[linear][format label]``, each ``[out, in]`` float32; every rounding is let go when it has been used."""
    errors: dict[str, dict[str, Tensor]] = {}
    for name, by_label in starts.items():
        for label in list(by_label):
            start = by_label.pop(label)
            errors.setdefault(name, {})[label] = dequantize(*start.rounded).float() - start.weight
    return errors


def group_errors(
    block: nn.Module,
    spec: BlockSpec,
    group: Sequence[LinearSpec],
    statistics: GroupStatistics,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> dict[str, dict[str, Tensor]]:
    """D of one input group ``[linear][format label]``, each ``[out, in]`` float32; unlisted linears are left out."""
    return _as_errors(_group_starts(block, spec, group, statistics, menu, method, stored_dtypes))


def _group_starts(
    block: nn.Module,
    spec: BlockSpec,
    group: Sequence[LinearSpec],
    statistics: GroupStatistics,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> InitialRoundings:
    """Roundings of one input group; unlisted linears are left out."""
    starts: InitialRoundings = {}
    wanted = [(linear, fmt) for linear in group for fmt in menu.get(linear.unit, ())]
    if not wanted:
        return starts
    factor = factorize(statistics.gram, statistics.num_tokens, method.damping, name=group[0].name)
    weights = {linear.name: read_weight(block, spec, linear) for linear in group}
    tasks = [Task(linear.name, weights[linear.name], fmt, stored_dtypes[linear.name]) for linear, fmt in wanted]
    for task, rounded in zip(tasks, round_group(tasks, factor, method, statistics), strict=True):
        start = InitialRounding(task.name, task.weight, rounded, task.quant_format)
        starts.setdefault(task.name, {})[task.quant_format.label] = start
    return starts


def _measure_head(
    stream: ModelStream,
    calibration: Tensor,
    known: Activations,
    seen: LayerRows,
    menu: Menu,
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    found: _Found,
) -> None:
    """Add what there is of the output head's unit, nothing where it has no format to score, or is no linear."""
    head = stream.structure.head
    if head is None:
        return
    statistics = stream.head_statistics(calibration, known)
    errors = group_errors(stream.model, head, head.linears, statistics, menu, method, stored_dtypes)
    for linear in head.linears:
        if linear.name in errors:
            powers: list[Tensor] = []
            rows = _seeing_input_power(seen.rows, read_weight(stream.model, head, linear), powers)
            found.add([linear], [LayerRows(rows, seen.positions, seen.outputs)], [errors[linear.name]])
            found.input_power[linear.unit] = torch.stack(powers).cpu()


def _seeing_input_power(
    rows: Iterable[tuple[Tensor, Tensor]], weight: Tensor, powers: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows as they are, while ‖g W‖² of each is noted."""
    for x, g in rows:
        powers.append((g.float() @ weight).square().sum(dtype=torch.float64))
        yield x, g
