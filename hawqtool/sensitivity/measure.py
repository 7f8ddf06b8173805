"""Measure every unit in every format with one forward and one reverse sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.model.experts import ExpertLinear
from hawqtool.model.sweep import (
    Activations,
    GroupStatistics,
    ModelStream,
    advance,
    group_statistics,
    local_name,
    read_weight,
    run_block,
)
from hawqtool.records import BlockSpec, LinearSpec, Score, Unit
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import RoundingMethod, Task, round_group
from hawqtool.sensitivity.scores import SIGNED, LayerRows, RowValues, add_rows, mean_score, score_rows, to_scores

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measurement:
    """What the two sweeps give.

    Args:
        scores: ``[metric][unit][format label]``.
        projections: ``[unit][format label]``, a value per scoring row: see `hawqtool.sensitivity.scores.SIGNED`. The
            output head's labels are drawn apart, so its pair terms with the blocks have mean zero.
        error_norms: ‖D‖² by linear and format label, for scores that need no more of the rounding.
        input_fisher: Per unit the trace of the Fisher matrix with respect to its input x at all tokens, per output,
            E‖∂loss/∂x‖²: noise of variance σ² on x costs σ²/2 times it. This is HAWQ-V2's sensitivity of activations
            (Dong et al. 2020, section 3.3) with the Gauss-Newton matrix in place of the Hessian.
    """

    scores: dict[str, dict[str, dict[str, Score]]]
    projections: dict[str, dict[str, list[float]]]
    error_norms: dict[str, dict[str, float]]
    input_fisher: dict[str, Score]


def measure(
    stream: ModelStream,
    calibration: Tensor,
    scoring: Tensor,
    menu: Mapping[str, Sequence[QuantFormat]],
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    rows_per_slice: int,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Scores of the original model.

    Layers are rounded with the Gram matrices of the calibration rows and scored on the scoring rows, which the
    rounding did not see: errors of compensated rounding are 1.4 to 2 times larger there.

    Args:
        stream: The original model.
        calibration: Rows behind the rounding: ``[rows, seq_len]`` tokens, or images.
        scoring: Rows behind the scores; disjoint from ``calibration``.
        menu: Unit to the formats to score; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        rows_per_slice: Rows per forward pass.
        seed: Seed of the sampled labels.
        progress: Called with the phase, blocks done and blocks in all.
    """
    sets = (stream.embed(calibration, rows_per_slice), stream.embed(scoring, rows_per_slice))
    stored: list[tuple[MutableSequence[Tensor], ...]] = []
    count = len(stream.structure.blocks)
    for spec in stream.structure.blocks:
        stored.append(tuple(copy(s.hidden) for s in sets))
        with stream.block(spec.index) as block:
            # Only the head needs what the last block gives on the calibration rows.
            for activations in sets[1:] if spec.index == count - 1 and not stream.structure.head else sets:
                advance(block, spec, activations)
        progress("forward sweep", spec.index + 1, count)
    gradients, outputs = _loss_gradients(stream, scoring.split(rows_per_slice), sets[1].hidden, seed)
    found = _Found({}, {}, {})
    if stream.structure.head:
        statistics = stream.head_statistics(calibration, sets[0].hidden)
        rows = _head_rows(stream, scoring, sets[1].hidden, seed)
        seen = LayerRows(rows, sets[1].hidden[0].shape[1], outputs)
        _measure_head(stream, statistics, seen, menu, method, stored_dtypes, found)
    for spec in reversed(stream.structure.blocks):
        for activations, hidden in zip(sets, stored.pop(), strict=True):
            activations.hidden = hidden
        with stream.block(spec.index) as block:
            errors = rounding_errors(block, spec, sets[0], menu, method, stored_dtypes)
            layers, gradients = _backward(block, spec, sets[1], gradients, outputs, found.input_power)
        for linear in spec.linears:
            if linear.name in errors:
                found.add(linear, layers.pop(linear.name), errors.pop(linear.name))
        progress("reverse sweep", count - spec.index, count)
    return found.measurement(stream.structure.units, outputs)


@dataclass
class _Found:
    """What the reverse sweep has found: row values and ‖∂loss/∂x‖² of a row by unit, ‖D‖² by linear."""

    unit_rows: dict[str, RowValues]
    input_power: dict[str, Tensor]
    error_norms: dict[str, dict[str, float]]

    def add(self, linear: LinearSpec, layer: LayerRows, errors: Mapping[str, Tensor]) -> None:
        add_rows(self.unit_rows.setdefault(linear.unit, {}), score_rows(layer, errors))
        norms = {label: float(error.square().sum(dtype=torch.float64)) for label, error in errors.items()}
        self.error_norms[linear.name] = norms

    def measurement(self, units: Sequence[Unit], outputs: int) -> Measurement:
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        projections: dict[str, dict[str, list[float]]] = {}
        for unit in units:
            values = self.unit_rows.get(unit.name, {})
            for metric, by_label in to_scores(values).items():
                scores.setdefault(metric, {})[unit.name] = by_label
            if values:
                projections[unit.name] = {label: rows.tolist() for label, rows in values[SIGNED].items()}
        power = {u.name: mean_score(self.input_power[u.name] / outputs) for u in units if u.name in self.unit_rows}
        return Measurement(scores, projections, self.error_norms, power)


def _loss_gradients(
    stream: ModelStream, rows: Sequence[Tensor], hidden: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], int]:
    """Gradient of each row's summed loss at the last block's output, and the outputs that a row has."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    gradients, count = [], 0
    for part, states in zip(rows, hidden, strict=True):
        found = []
        for row, state in zip(part, states, strict=True):
            leaf = state[None].detach().requires_grad_()
            outputs = stream.outputs(row[None], leaf)[0].float()
            if not bool(torch.isfinite(outputs).all()):
                raise NumericalError("the original model gives outputs that are NaN or Inf; check its weights")
            count = len(outputs)
            loss = (_label_loss if stream.task.logits else _embedding_loss)(outputs, generator)
            found.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(torch.cat(found))
    return gradients, count


def _label_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed negative log-likelihood of labels drawn from the model at every output ``[outputs, classes]``."""
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _embedding_loss(embedding: Tensor, generator: torch.Generator) -> Tensor:
    """Random projection of an embedding ``[1, width]``; half its mean squared change is ‖Δe‖² / ‖e‖²."""
    direction = torch.randn(embedding.shape, generator=generator, device=embedding.device)
    return 2**0.5 * (direction * embedding).sum() / embedding.detach().norm()


def rounding_errors(
    block: nn.Module,
    spec: BlockSpec,
    calibration: Activations,
    menu: Mapping[str, Sequence[QuantFormat]],
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> dict[str, dict[str, Tensor]]:
    """D = Q(W) - W per linear and format label, rounded with the original model's Gram matrices.

    Args:
        block: The loaded block.
        spec: Its structure.
        calibration: The original's hidden states before the block.
        menu: Unit to the formats to round to; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.

    Returns:
        ``[linear][format label]``, each ``[out, in]`` float32.
    """
    errors: dict[str, dict[str, Tensor]] = {}
    for group, statistics in group_statistics(block, spec, calibration, spec.input_groups):
        errors |= group_errors(block, spec, group, statistics, menu, method, stored_dtypes)
    return errors


def group_errors(
    block: nn.Module,
    spec: BlockSpec,
    group: Sequence[LinearSpec],
    statistics: GroupStatistics,
    menu: Mapping[str, Sequence[QuantFormat]],
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> dict[str, dict[str, Tensor]]:
    """D of one input group ``[linear][format label]``, each ``[out, in]`` float32; unlisted linears are left out."""
    errors: dict[str, dict[str, Tensor]] = {}
    wanted = [(linear, fmt) for linear in group for fmt in menu.get(linear.unit, ())]
    if not wanted:
        return errors
    factor = factorize(statistics.gram, statistics.num_tokens, method.damping, name=group[0].name)
    weights = {linear.name: read_weight(block, spec, linear) for linear in group}
    tasks = [Task(linear.name, weights[linear.name], fmt, stored_dtypes[linear.name]) for linear, fmt in wanted]
    for task, rounded in zip(tasks, round_group(tasks, factor, method), strict=True):
        difference = dequantize(*rounded).float() - task.weight
        errors.setdefault(task.name, {})[task.quant_format.label] = difference
    return errors


def _measure_head(
    stream: ModelStream,
    statistics: GroupStatistics,
    seen: LayerRows,
    menu: Mapping[str, Sequence[QuantFormat]],
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
    found: _Found,
) -> None:
    """Add what there is of the output head's unit, nothing where it has no format to score."""
    head = stream.structure.head
    assert head is not None  # the caller saw to it
    errors = group_errors(stream.model, head, head.linears, statistics, menu, method, stored_dtypes)
    for linear in head.linears:
        if linear.name in errors:
            powers: list[Tensor] = []
            rows = _seeing_input_power(seen.rows, read_weight(stream.model, head, linear), powers)
            found.add(linear, LayerRows(rows, seen.positions, seen.outputs), errors[linear.name])
            found.input_power[linear.unit] = torch.stack(powers).cpu()


def _seeing_input_power(
    rows: Iterable[tuple[Tensor, Tensor]], weight: Tensor, powers: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows as they are, while ‖g W‖² of each is noted."""
    for x, g in rows:
        powers.append((g.float() @ weight).square().sum(dtype=torch.float64))
        yield x, g


def _head_rows(
    stream: ModelStream, rows: Tensor, hidden: Sequence[Tensor], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of the head and gradients at the logits, row by row; labels are drawn anew."""
    generator = torch.Generator(stream.device).manual_seed(seed + 1)
    states = [state for part in hidden for state in part]
    for row, state in zip(rows, states, strict=True):
        with torch.no_grad():
            x = stream.head_inputs(row[None], state[None])
            logits = stream.outputs(row[None], state[None])[0].float()
        leaf = logits.requires_grad_()
        yield x, torch.autograd.grad(_label_loss(leaf, generator), leaf)[0]


def _backward(
    block: nn.Module,
    spec: BlockSpec,
    scoring: Activations,
    gradients: list[Tensor],
    outputs: int,
    input_power: dict[str, Tensor],
) -> tuple[dict[str, LayerRows], list[Tensor]]:
    """What every linear saw with the gradients at its output, and the gradient at the block's input.

    ``input_power`` gains each unit's squared gradients at its inputs, summed over the tokens of a row, ``[rows]``.
    """
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {linear.name: ([], []) for linear in spec.linears}
    before = []
    for position, hidden in enumerate(scoring.hidden):
        captured: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

        def capture(
            module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str, into: Any = captured
        ) -> None:
            into[name] = (module, inputs[0].detach(), output)

        hooks = [
            block.get_submodule(local_name(spec, m)).register_forward_hook(partial(capture, name=m.name))
            for m in spec.linears
        ]
        leaf = hidden.detach().requires_grad_()
        try:
            with torch.enable_grad():
                output = run_block(block, leaf, scoring.calls[position][spec.index])
                names = list(captured)
                found = torch.autograd.grad(output, [leaf, *(captured[n][2] for n in names)], gradients[position])
        finally:
            for hook in hooks:
                hook.remove()
        before.append(found[0])
        for name, gradient in zip(names, found[1:], strict=True):
            module, x, _ = captured[name]
            for into, values in zip(seen[name], (x, gradient), strict=True):
                into += _by_row(module, values, *hidden.shape[:2])
        for name in seen.keys() - captured.keys():  # an expert that no token of the slice was routed to
            weight = block.get_parameter(f"{local_name(spec, _linear(spec, name))}.weight")
            for into, width in zip(seen[name], reversed(weight.shape), strict=True):
                into += [weight.new_zeros(0, width)] * len(hidden)
    _add_input_power(block, spec, {n: g for n, (_, g) in seen.items()}, input_power)
    positions = scoring.hidden[0].shape[1]
    return {n: LayerRows(zip(x, g, strict=True), positions, outputs) for n, (x, g) in seen.items()}, before


def _add_input_power(
    block: nn.Module, spec: BlockSpec, gradients: Mapping[str, Sequence[Tensor]], into: dict[str, Tensor]
) -> None:
    """Add ‖∂loss/∂x‖² of every unit and row, x reaching the loss through all the unit's linears that share it."""
    for group in spec.input_groups:
        for unit in dict.fromkeys(linear.unit for linear in group):
            members = [linear for linear in group if linear.unit == unit]
            weights = [read_weight(block, spec, m) for m in members]
            powers = []
            for row in zip(*(gradients[m.name] for m in members), strict=True):
                at_input = sum(g.float() @ weight for g, weight in zip(row, weights, strict=True))
                powers.append(torch.as_tensor(at_input).square().sum(dtype=torch.float64))
            power = torch.stack(powers).cpu()
            into[unit] = into[unit] + power if unit in into else power


def _linear(spec: BlockSpec, name: str) -> LinearSpec:
    return next(linear for linear in spec.linears if linear.name == name)


def _by_row(module: nn.Module, values: Tensor, rows: int, positions: int) -> list[Tensor]:
    """Split ``[rows, ..., n]``, its flattened form, or the tokens routed to an expert, by row."""
    flat = values.flatten(0, -2)
    if not isinstance(module, ExpertLinear):
        return list(flat.reshape(rows, -1, flat.shape[-1]))
    row = module.positions // positions
    # Tokens come by rank of the choice; sorted by row, those of one row lie together.
    ordered = flat[row.argsort(stable=True)]
    return list(ordered.split(torch.bincount(row, minlength=rows).tolist()))
