"""What it changes when a unit of a quantized model takes another format: by gradients at the plan, all units at once.

At the quantized model the gradient of KL(original || quantized) at the logits is q - p, exactly and without labels.
So one reverse sweep gives the first-order change of the true divergence for every unit and format. Rounding errors of
all other units are in that gradient, which is how interactions enter. A second cotangent, q less a label drawn from q,
gives the curvature: its mean square is the Gauss-Newton matrix there, whatever p is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.model.block import LoadedBlock
from hawqtool.records import BlockSpec, MeasurementRows, Menu, UnitScores
from hawqtool.rounding.layer import round_layers
from hawqtool.rounding.spec import RoundingErrors, RoundingSpec
from hawqtool.runtime.determinism import FixedOrder
from hawqtool.sensitivity.backward import block_backward
from hawqtool.sensitivity.forward import Progress
from hawqtool.sensitivity.gradient_limit import GRADIENT_LIMIT, GradientLimit
from hawqtool.sensitivity.label_gradients import draw_labels
from hawqtool.sensitivity.scores import SIGNED, LayerRows, mean_score, score_rows
from hawqtool.streaming.block import Activations, advance, check_states
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.offload import Offload
from hawqtool.streaming.spliced import BlockRoundings, RoundingStore, SplicedModel
from hawqtool.streaming.stream import ModelStream

_POSITIONS = 256
"""Positions whose logits, of both models, a CPU holds at a time."""

UnitRows = dict[str, dict[str, Tensor]]
"""``[unit][format label]`` to ``[rows]`` float64, nats per output."""


def round_formats(
    original: ModelStream,
    prefix: ModelStream,
    rows: MeasurementRows,
    rounding: RoundingSpec,
    offload: Offload | None,
    progress: Progress,
) -> RoundingStore:
    """Every unit rounded in each of its formats, on the prefix that a plan's rounding left.

    With the plan's own format this is what the plan's rounding gave, but for output feedback and learning, which are
    left out: each format would take a loop over rows, or a training, of its own. An output head is left out.

    Args:
        original: The original model, whose weights are rounded.
        prefix: The model as that plan quantized it, which gives the layers' inputs.
        rows: Rows behind the rounding.
        rounding: Method, and the formats of every unit.
        offload: Finds room for the result; None where all stays on the device.
        progress: Called with the phase, blocks done and blocks in all.
    """
    method, size, calibration = rounding.method, rows.batch_size, rows.calibration
    needs = method.needs_held_out, method.needs_drift
    known = prefix.embed(calibration.tokens, size, *needs, importance=calibration.importance)
    store, count = RoundingStore(offload), len(prefix.structure.blocks)
    for spec in prefix.structure.blocks:
        with prefix.block(spec.index) as block, original.block(spec.index) as source:
            layers = []
            for group, statistics in group_statistics(block, known, spec.input_groups, source):
                tasks = rounding.tasks(source, group)
                if tasks:
                    layers += round_layers(tasks, statistics, rounding.factor(tasks, statistics), method)
            store.put(spec.index, layers)
            if known.original is not None:
                advance(source, Activations(known.original, known.calls))
            advance(block, known)
        progress("swaps, every format", spec.index + 1, count)
    return store


class Reference(NamedTuple):
    """What the spliced model is compared with.

    Args:
        original: The original model.
        rows: ``[rows, seq_len]`` tokens, or images.
        states: ``[rows, positions, width]``, its last block's output on them.
    """

    original: ModelStream
    rows: Tensor
    states: Tensor


@dataclass(frozen=True)
class PlanChanges:
    """Predicted change of the divergence by row where one unit takes another format than it has.

    Args:
        first: <∂KL/∂W, W' - W> of each row: exact to first order.
        curvature: 1/2 Σ_r (g̃_r · (W' - W)_r)² of each row, g̃ being the gradient for labels drawn from the quantized
            model: its mean is the second-order term within each output channel, and its members' sum the unit's.
    """

    first: UnitRows = field(default_factory=dict)
    curvature: UnitRows = field(default_factory=dict)

    def rows(self, unit: str, label: str) -> Tensor:
        """Both terms of every row together, ``[rows]`` float64."""
        return self.first[unit][label] + self.curvature[unit][label]

    def scores(self) -> UnitScores:
        """Means over rows with their standard errors."""
        return {u: {label: mean_score(self.rows(u, label)) for label in found} for u, found in self.first.items()}

    def together(self, moves: Mapping[str, str]) -> Tensor:
        """Change of every row, ``[rows]`` float64, where several units move, as if nothing came of pairs of them."""
        return torch.stack([self.rows(unit, label) for unit, label in moves.items()]).sum(0)


def plan_changes(
    reference: Reference,
    model: SplicedModel,
    batch_size: int,
    menu: Menu,
    seed: int,
    progress: Progress,
    gradient_limit: float = GRADIENT_LIMIT,
) -> PlanChanges:
    """First- and second-order change of the divergence for every unit and format, at the plan of a spliced model.

    A forward sweep that keeps the state before each block, and a reverse sweep with two cotangents, a block in memory
    at a time.

    Args:
        reference: The original's outputs on the rows to measure on.
        model: The quantized model.
        batch_size: Rows per pass.
        menu: Formats by unit; a unit's present one is not measured.
        seed: Seed of the labels.
        progress: Called with the phase, blocks done and blocks in all.
        gradient_limit: Of the curvature's gradients, see `GradientLimit`; infinite for none.

    Raises:
        NumericalError: If outputs or gradients are not finite.
    """
    stream, blocks = model.stream, model.stream.structure.blocks
    generator, order = torch.Generator(stream.device).manual_seed(seed), FixedOrder(stream.device)
    with stream.keeping_pages():
        seen, stored = stream.embed(reference.rows, batch_size), []
        for spec in blocks:
            stored.append(copy(seen.hidden))
            with model.block(spec.index) as (block, _):
                advance(block, seen)
            progress("swaps, forward", spec.index + 1, len(blocks))
        first, second, outputs = output_gradients(reference, stream, seen.hidden, generator)
        limit, changes = GradientLimit.of(second, gradient_limit), PlanChanges()
        for spec in reversed(blocks):
            seen.hidden = stored.pop()
            with model.block(spec.index) as (block, roundings):
                errors = _changes(block, roundings, model, menu)
                layers, first = order.run(partial(block_backward, block, seen, first, outputs, {}))
                _add(changes.first, spec, layers, errors, SIGNED)
                layers, second = order.run(partial(block_backward, block, seen, second, outputs, {}))
                _add(changes.curvature, spec, layers, errors, "projection")
                del layers
            check_states([*first, *second], f"the gradient at the input of block {spec.name}")
            second = limit.limited(second)
            progress("swaps, gradient", len(blocks) - spec.index, len(blocks))
    return changes


def _changes(block: LoadedBlock, roundings: BlockRoundings, model: SplicedModel, menu: Menu) -> RoundingErrors:
    """W' - W by linear and format label, W' in the dtype that it is computed with."""
    found: RoundingErrors = {}
    for linear in block.spec.linears:
        present = block.weight(linear)
        for label in (fmt.label for fmt in menu.get(linear.unit, ())):
            if label != model.label(linear) and (linear.name, label) in roundings:
                other = roundings.weight(linear.name, label).to(block.parameter(linear).dtype).float()
                found.setdefault(linear.name, {})[label] = other - present
    return found


def _add(into: UnitRows, spec: BlockSpec, layers: dict[str, LayerRows], errors: RoundingErrors, name: str) -> None:
    """Add what one score of `score_rows` gives for the linears of a block, per output."""
    for group in spec.input_groups:
        members = [linear for linear in group if linear.name in errors]
        if not members:
            continue
        seen = [layers.pop(member.name) for member in members]
        values = score_rows(seen, [errors[member.name] for member in members], ("projection",))
        share = seen[0].outputs ** -0.5 if name == SIGNED else 1.0
        for member, by_metric in zip(members, values, strict=True):
            held = into.setdefault(member.unit, {})
            for label, rows in by_metric[name].items():
                held[label] = held[label] + share * rows if label in held else share * rows


def output_gradients(
    reference: Reference, candidate: ModelStream, hidden: Sequence[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], int]:
    """Two gradients at the candidate's last block's output, per batch, and the outputs that a row has.

    The first is that of each row's summed divergence from the original; the second that of the loss for labels drawn
    from the candidate, or of a random direction of its embedding, whose mean square is the curvature.

    Args:
        reference: The original's outputs.
        candidate: Stream that gives the candidate's norm and head.
        hidden: ``[rows, positions, width]`` per batch, the candidate's last block's output.
        generator: Draws the labels.

    Raises:
        NumericalError: If the candidate's outputs are not finite.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    task, number, count = reference.original.task, 0, 0
    cotangents: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
    cotangents = _logit_gradients if task.logits else _embedding_gradients
    for states in hidden:
        batch: tuple[list[Tensor], list[Tensor]] = ([], [])
        for state in states:
            row, expected, pieces, count = reference.rows[number], reference.states[number], list[list[Tensor]](), 0
            for positions in candidate.output_parts(len(state), _POSITIONS):
                part = row[None, positions] if task.generates else row[None]
                with torch.no_grad():
                    original = reference.original.outputs(part, expected[None, positions])[0].float()
                leaf = state[None, positions].detach().requires_grad_()
                with torch.enable_grad():
                    outputs = candidate.outputs(part, leaf)[0].float()
                if not bool(torch.stack(outputs.detach().aminmax()).isfinite().all()):
                    raise NumericalError("the quantized model gives outputs that are NaN or Inf")
                ends = cotangents(original, outputs.detach(), generator)
                pieces.append([torch.autograd.grad(outputs, leaf, end, retain_graph=True)[0] for end in ends])
                count += len(outputs)
            for into, parts in zip(batch, zip(*pieces, strict=True), strict=True):
                into.append(torch.cat(parts, 1))
            number += 1
        for gradients, rows in zip(found, batch, strict=True):
            gradients.append(torch.cat(rows))
    return *found, count


def _logit_gradients(original: Tensor, candidate: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradients q - p, and q less a label drawn from q, from logits ``[outputs, classes]``."""
    q = candidate.softmax(-1)
    first, labels = q - original.softmax(-1), draw_labels(q, generator)
    q[torch.arange(len(labels), device=labels.device), labels] -= 1
    return first, q


def _embedding_gradients(original: Tensor, candidate: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradient of ‖ê - e‖² / ‖e‖², and a random direction whose squared product with Δê is twice ‖Δê‖² / ‖e‖²."""
    norm = original.norm()
    direction = torch.randn(candidate.shape, generator=generator, device=candidate.device)
    return 2 * (candidate - original) / norm.square(), 2**0.5 * direction / norm
