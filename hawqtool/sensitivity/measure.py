"""Measure every unit in every format with one forward and one reverse sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.model.sweep import Activations, ModelStream, advance, gram, group_inputs, local_name, run_block
from hawqtool.records import BlockSpec, LinearSpec, Score
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import RoundingMethod, Task, round_group
from hawqtool.sensitivity.scores import RowValues, add_rows, score_rows, to_scores

Progress = Callable[[str, int, int], None]


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
) -> dict[str, dict[str, dict[str, Score]]]:
    """Scores ``[metric][unit][format label]`` of the original model.

    Layers are rounded with the Gram matrices of the calibration rows and scored on the scoring rows, which the
    rounding did not see: errors of compensated rounding are 1.4 to 2 times larger there.

    Args:
        stream: The original model.
        calibration: ``[rows, seq_len]`` tokens behind the rounding.
        scoring: ``[rows, seq_len]`` tokens behind the scores; disjoint from ``calibration``.
        menu: Unit to the formats to score; units that are missing are skipped.
        method: Rounding that will be applied.
        stored_dtypes: Linear to the dtype of its stored scales.
        rows_per_slice: Rows per forward pass.
        seed: Seed of the sampled labels.
        progress: Called with the phase, blocks done and blocks in all.
    """
    sets = (stream.embed(calibration, rows_per_slice), stream.embed(scoring, rows_per_slice))
    stored: list[tuple[list[Tensor], ...]] = []
    count = len(stream.structure.blocks)
    for spec in stream.structure.blocks:
        stored.append(tuple(list(s.hidden) for s in sets))
        with stream.block(spec.index) as block:
            for activations in sets[1:] if spec.index == count - 1 else sets:
                advance(block, spec, activations)
        progress("forward sweep", spec.index + 1, count)
    gradients = _loss_gradients(stream, scoring.split(rows_per_slice), sets[1].hidden, seed)
    unit_rows: dict[str, RowValues] = {}
    for spec in reversed(stream.structure.blocks):
        for activations, hidden in zip(sets, stored.pop(), strict=True):
            activations.hidden = hidden
        with stream.block(spec.index) as block:
            errors = _rounding_errors(block, spec, sets[0], menu, method, stored_dtypes)
            seen, gradients = _backward(block, spec, sets[1], gradients)
        for linear in spec.linears:
            if linear.name in errors:
                rows = score_rows(*seen.pop(linear.name), errors.pop(linear.name))
                add_rows(unit_rows.setdefault(linear.unit, {}), rows)
        progress("reverse sweep", count - spec.index, count)
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for unit in stream.structure.units:
        for metric, scores in to_scores(unit_rows.get(unit.name, {})).items():
            table.setdefault(metric, {})[unit.name] = scores
    return table


def _loss_gradients(stream: ModelStream, tokens: Sequence[Tensor], hidden: list[Tensor], seed: int) -> list[Tensor]:
    """Gradient of each row's summed loss at the last block's output; labels drawn from the model at all positions."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    gradients = []
    for part, states in zip(tokens, hidden, strict=True):
        rows = []
        for row, state in zip(part, states, strict=True):
            leaf = state[None].detach().requires_grad_()
            logits = stream.logits(row[None], leaf)[0].float()
            if not bool(torch.isfinite(logits).all()):
                raise NumericalError("the original model gives logits that are NaN or Inf; check its weights")
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            rows.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(torch.cat(rows))
    return gradients


def _rounding_errors(
    block: nn.Module,
    spec: BlockSpec,
    calibration: Activations,
    menu: Mapping[str, Sequence[QuantFormat]],
    method: RoundingMethod,
    stored_dtypes: Mapping[str, torch.dtype],
) -> dict[str, dict[str, Tensor]]:
    """D = Q(W) - W per linear and format label, rounded with the original model's Gram matrices."""
    grams: dict[str, Tensor] = {}
    tokens = 0

    def accumulate(group: Sequence[LinearSpec], x: Tensor) -> None:
        nonlocal tokens
        part = gram(x) * x.shape[0]
        name = group[0].name
        grams[name] = grams[name].add_(part) if name in grams else part
        tokens += x.shape[0] if group is spec.input_groups[0] else 0

    with group_inputs(block, spec, accumulate), torch.no_grad():
        for position, hidden in enumerate(calibration.hidden):
            run_block(block, hidden, calibration.calls[position][spec.index])
    errors: dict[str, dict[str, Tensor]] = {}
    for group in spec.input_groups:
        wanted = [(linear, fmt) for linear in group for fmt in menu.get(linear.unit, ())]
        if not wanted:
            continue
        factor = factorize(grams.pop(group[0].name) / tokens, tokens, method.damping)
        weights = {m.name: block.get_parameter(f"{local_name(spec, m)}.weight").float() for m in group}
        tasks = [
            Task(linear.name, weights[linear.name], fmt, stored_dtypes[linear.name])
            for linear, fmt in wanted
        ]
        for task, rounded in zip(tasks, round_group(tasks, factor, method), strict=True):
            difference = dequantize(*rounded).float() - task.weight
            errors.setdefault(task.name, {})[task.quant_format.label] = difference
    return errors


def _backward(
    block: nn.Module, spec: BlockSpec, scoring: Activations, gradients: list[Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor]]:
    """Inputs and output gradients of every linear, and the gradient at the block's input, slice by slice."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {linear.name: [] for linear in spec.linears}
    before = []
    for position, hidden in enumerate(scoring.hidden):
        captured: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            block.get_submodule(local_name(spec, linear)).register_forward_hook(
                lambda _m, inputs, output, name=linear.name, into=captured: into.__setitem__(
                    name, (inputs[0].detach(), output)
                )
            )
            for linear in spec.linears
        ]
        leaf = hidden.detach().requires_grad_()
        try:
            with torch.enable_grad():
                output = run_block(block, leaf, scoring.calls[position][spec.index])
                outputs = [captured[linear.name][1] for linear in spec.linears]
                found = torch.autograd.grad(output, [leaf, *outputs], gradients[position])
        finally:
            for hook in hooks:
                hook.remove()
        before.append(found[0])
        for linear, gradient in zip(spec.linears, found[1:], strict=True):
            seen[linear.name].append((captured[linear.name][0], gradient))
    joined = {n: (torch.cat([x for x, _ in p]), torch.cat([g for _, g in p])) for n, p in seen.items()}
    return joined, before
