"""Loss along the rounding error of all units together, beside its second-order prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.model.block import LoadedBlock
from hawqtool.records import LinearSpec
from hawqtool.rounding.spec import RoundingErrors, RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.sensitivity.curvature.hvp import Stage, Weights
from hawqtool.sensitivity.measure import Progress, head_errors, rounding_errors
from hawqtool.sensitivity.measured_kl import finite
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.stream import ModelStream

SCALES = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0, 9 / 8, 5 / 4)
"""Shares a of the rounding error at which the loss is measured."""
_TOLERANCE = 0.25


@dataclass(frozen=True)
class LossAlong:
    """Divergence of W + a·D from W, row by row.

    Args:
        scales: The values of a, rising.
        divergence: ``[scales, rows]`` float64, nats per output, or the relative squared error of the embedding.
        quadratic: ``[rows]`` float64, ½ Dᵀ F D with F the Fisher matrix of the row per output, cross terms between all
            layers included; a² times it is what the divergence tends to for small a.
    """

    scales: tuple[float, ...]
    divergence: Tensor
    quadratic: Tensor

    @property
    def breaks_at(self) -> float | None:
        """The first a at which the mean divergence is a quarter off the mean prediction; None where none is."""
        predicted = float(self.quadratic.mean())
        for scale, value in zip(self.scales, self.divergence.mean(1).tolist(), strict=True):
            if scale and abs(value - scale**2 * predicted) > _TOLERANCE * scale**2 * predicted:
                return scale
        return None


def loss_along(
    stream: ModelStream,
    calibration: Tensor | None,
    rows: Tensor,
    rounding: RoundingSpec,
    batch_size: int,
    progress: Progress,
    scales: Sequence[float] = SCALES,
) -> LossAlong:
    """Divergence from the original along the rounding error of all units.

    One forward sweep with one block's weights in memory: the hidden states of all a advance together, so that there
    are as many as scales, and with them the derivative of the original's along D, from which the prediction follows
    without sampling: ½ Dᵀ F D is half the variance, under the softmax, of the derivative of the logits.

    Args:
        stream: The original model, in float32 or wider.
        calibration: Rows whose Gram matrices in the original model guide the rounding; None for plain rounding, with
            the scales of least squared error of the weights.
        rows: Rows to measure on: ``[rows, seq_len]`` tokens, or images.
        rounding: One format for every unit that is rounded, and the method, plain where there are no calibration rows.
        batch_size: Rows per forward pass.
        progress: Called with the phase, blocks done and blocks in all.
        scales: Values of a, rising from 0.

    Raises:
        NumericalError: If outputs are not finite.
    """
    seen = stream.embed(rows, batch_size)
    known = None if calibration is None else stream.embed(calibration, batch_size, rounding.method.needs_held_out)
    moved = [Activations(list(seen.hidden), seen.calls) for _ in scales]
    changes = [torch.zeros_like(hidden) for hidden in seen.hidden]
    for spec in stream.structure.blocks:
        with stream.block(spec.index) as block, torch.no_grad():
            errors = _errors(block, known, rounding)
            for position, hidden in enumerate(seen.hidden):
                stage = Stage.of_block(block, seen.calls[position][spec.index])
                seen.hidden[position], changes[position] = _derivative(stage, errors, hidden, changes[position])
            for scale, activations in zip(scales, moved, strict=True):
                with block.with_weights(block.shifted(_scaled(errors, scale))):
                    advance(block, activations)
            if known:
                advance(block, known)
        progress("loss along the rounding error", spec.index + 1, len(stream.structure.blocks))
    with torch.no_grad():
        errors = _head_errors(stream, calibration, known, rounding)
        divergence = _divergence(stream, rows, scales, moved, errors)
        quadratic = _quadratic(stream, rows, torch.cat(list(seen.hidden)), torch.cat(changes), errors)
    return LossAlong(tuple(scales), divergence, quadratic)


Errors = dict[str, Tensor]
"""D by linear, ``[out, in]`` float32."""


def _errors(block: LoadedBlock, known: Activations | None, rounding: RoundingSpec) -> Errors:
    """D of every linear of a block that is rounded."""
    if known is not None:
        return _only(rounding_errors(block, known, rounding))
    groups = ((group, _unweighted(group, block.module)) for group in block.spec.input_groups)
    return _only(rounding.block_errors(block, groups, ()))


def _unweighted(group: Sequence[LinearSpec], module: nn.Module) -> GroupStatistics:
    """Statistics under which all inputs count alike."""
    size = group[0].in_features
    return GroupStatistics(torch.eye(size, device=next(module.parameters()).device), size, size)


def _head_errors(
    stream: ModelStream, calibration: Tensor | None, known: Activations | None, rounding: RoundingSpec
) -> Errors:
    head = stream.head
    if calibration is not None and known is not None:
        return _only(head_errors(stream, calibration, known, rounding))
    if head is None:
        return {}
    statistics = _unweighted(head.spec.linears, stream.model.get_output_embeddings())
    return _only(rounding.errors(head, head.spec.linears, statistics))


def _only(errors: RoundingErrors) -> Errors:
    """Errors by linear where each has one format."""
    return {name: error for name, by_label in errors.items() for error in by_label.values()}


def _scaled(errors: Errors, scale: float) -> Errors:
    return {name: scale * error for name, error in errors.items()}


def _derivative(stage: Stage, errors: Errors, hidden: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a stage and its derivative in a, at a = 0, from those of its input."""
    weights, transposed = Weights(), {linear.name for linear in stage.linears if linear.transposed}
    values = {n: w.detach() for n, w in weights.values(stage, hidden).items() if n in errors}
    tangents = {n: (errors[n].t() if n in transposed else errors[n]).to(w.dtype) for n, w in values.items()}
    # Fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        found: Any = torch.func.jvp(partial(weights.run, stage), (values, hidden), (tangents, change))
    return found[0], found[1]


def _divergence(
    stream: ModelStream, rows: Tensor, scales: Sequence[float], moved: Sequence[Activations], errors: Errors
) -> Tensor:
    """``[scales, rows]`` from the last hidden states, of which the first, at 0, are the original's."""
    finals = {str(a): torch.cat(list(activations.hidden)) for a, activations in zip(scales, moved, strict=True)}
    comparison, head = OutputComparison(stream, stream, rows, finals[str(scales[0])]), stream.head
    if head is None:
        found = comparison.divergences(finals)
    else:
        found = comparison.divergences(
            finals, lambda scale: head.with_weights(head.shifted(_scaled(errors, float(scale))))
        )
    finite("the rounding error", found)
    return torch.stack([found[str(scale)] for scale in scales])


def _quadratic(stream: ModelStream, rows: Tensor, hidden: Tensor, changes: Tensor, errors: Errors) -> Tensor:
    """``[rows]`` float64, row by row because outputs are large."""
    found = []
    for row, state, change in zip(rows, hidden, changes, strict=True):
        stage = Stage(stream.head, partial(stream.outputs, row[None]))
        outputs, moved = _derivative(stage, errors, state[None], change[None])
        if stream.task.logits:
            p = outputs.softmax(-1)
            centred = moved - (p * moved).sum(-1, keepdim=True)
            found.append(0.5 * (p * centred.square()).sum(-1).double().mean())
        else:
            found.append(moved.double().square().sum() / outputs.double().square().sum())
    return torch.stack(found).cpu()
