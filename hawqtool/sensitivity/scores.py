"""Predicted loss of rounding one layer, from its inputs, output gradients and rounding errors.

The loss is the negative log-likelihood of labels sampled from the model's own softmax at every output, summed over
the outputs of a row. Its gradient is an unbiased probe of the Fisher matrix F, and to second order
KL(original || rounded) = ½ vec(D)ᵀ F vec(D). All scores are nats per output (per token for language models), or
for embedding models the relative squared error of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hawqtool.records import SWEEP_METRICS, Score, UnitScores
from hawqtool.rounding.gram import GRAM_PANEL, token_product
from hawqtool.rounding.kernels.tensor_cores import coarse_products
from hawqtool.runtime.ranks import ALONE, Ranks

RowValues = dict[str, dict[str, Tensor]]
"""``[metric][format label]`` to ``[rows]`` float64; the mean over rows is the score."""

SIGNED = "signed"
"""Beside the metrics, what pair terms between units need: Σ G_n ∘ D / √m of each row, a signed first-order change."""

_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 22, 1 << 26
"""Elements of the rows' gradients, or of their second moments, that are held together."""


@dataclass(frozen=True)
class LayerRows:
    """What a layer saw and how the loss depends on it, row by row.

    A layer may see fewer tokens of a row than there are: an expert sees those that are routed to it.

    Args:
        rows: Per row the inputs ``[tokens, in]`` and, at the layer's output, the gradients of the row's summed loss
            ``[tokens, out]``; read once, so that large outputs need not be held together.
        positions: Tokens of a row; with ``outputs`` they make the scores comparable between layers.
        outputs: Outputs of a row that the loss sums over, hence what a score is per.
    """

    rows: Iterable[tuple[Tensor, Tensor]]
    positions: int
    outputs: int


def score_rows(
    layers: Sequence[LayerRows],
    errors: Sequence[Mapping[str, Tensor]],
    metrics: Sequence[str] = SWEEP_METRICS,
    ranks: Ranks = ALONE,
) -> list[RowValues]:
    """The metrics of the layers that share one input, for every format, row by row.

    With G_n = Σ_t g_t x_tᵀ the gradient of row n, D the rounding error, n the number of weights, T the positions
    and m the outputs of a row (T = m for a language model):

    - ``fisher``: 1/(2m) E Σ (G ∘ D)², the diagonal of F times the real error;
    - ``projection``: 1/(2m) E Σ_r (G_r · D_r)², the blocks of F that belong to one output channel r, which is all that
      one layer has where the errors of its channels are independent;
    - ``hawq-ggn``: ½ E‖G‖² / (m n) · ‖D‖², HAWQ-V2's form (Dong et al. 2020, eq. 11) with the Gauss-Newton trace;
    - ``kron``: T/(2m) Σ_r E[g_r²] (D H Dᵀ)_rr with H = E[x xᵀ]; (D H Dᵀ)_rr is the mean of (D_r · x_t)². Where a
      layer sees only a share p of the tokens, both means are over those, and the product is multiplied by p.

    ``kron`` takes the errors of a row's tokens as independent. That holds where each token has an output with a label
    of its own (the labels are), not where the tokens of a row share one output: there errors add up over tokens as
    far as the inputs have a common direction, and only ``projection`` counts that.

    ``kron`` is a product of two means, so its row values are linearised: they average to the score, and their
    spread is that of the score to first order.

    Args:
        layers: Inputs and gradients on the scoring rows; the inputs are read from the first layer alone.
        errors: Per layer, format label to D = Q(W) - W, ``[out, in]`` float32.
        metrics: Those wanted. ``kron`` needs the second moments of the inputs, all others the gradients of the rows.
        ranks: Processes that share the rows: the values are those of this one's, the two means of ``kron`` of all.
    """
    projects = any(metric != "kron" for metric in metrics)
    # Formats lie between outputs and inputs, so that the products of one output with all formats are one matrix.
    stacked = [torch.stack([error.float() for error in by_label.values()], 1) for by_label in errors]
    found = [_gradient_terms(layer, error, metrics) for layer, error in zip(layers, stacked, strict=True)]
    inputs = found[0].inputs
    powers = [ranks.mean(terms.power.mean(0), len(inputs)) for terms in found]
    if "kron" in metrics:
        with coarse_products() if stacked[0].is_cuda else nullcontext():
            found_terms = _input_terms(inputs, stacked, powers)
        seen = [(ranks.mean(own, len(inputs)), weighted) for own, weighted in found_terms]
    else:
        seen = [(error.new_zeros(error.shape[:2]).double(), error.new_zeros(()).double()) for error in stacked]
    mean_tokens, values = _mean_tokens(inputs, ranks), []
    for layer, labels, error, terms, power, (own, weighted) in zip(
        layers, errors, stacked, found, powers, seen, strict=True
    ):
        product = terms.power @ own + weighted - power @ own
        norms = torch.stack([by_format.norm().double().square() for by_format in error.unbind(1)])
        scale = 2 * layer.outputs
        by_metric = {
            "fisher": terms.fisher / scale,
            "projection": terms.projection / scale,
            SIGNED: terms.signed / layer.outputs**0.5,
            "hawq-ggn": terms.trace[:, None] * norms / (scale * error[:, 0].numel()),
            "kron": product * layer.positions / (scale * mean_tokens),
        }
        wanted = {name: v for name, v in by_metric.items() if name in metrics or (name == SIGNED and projects)}
        values.append({name: dict(zip(labels, v.t().cpu(), strict=True)) for name, v in wanted.items()})
    return values


def _mean_tokens(inputs: Sequence[Tensor], ranks: Ranks) -> float:
    """Mean of the tokens that a layer saw of each row.

    Sums over the tokens seen divided by all positions are p times the mean over those seen; one of the two factors of
    ``kron`` needs to be that mean itself.
    """
    own = torch.tensor(sum(map(len, inputs)) / len(inputs), dtype=torch.float64)
    return float(ranks.mean(own, len(inputs))) or 1 / len(inputs)


@dataclass(frozen=True)
class _GradientTerms:
    """What the gradients of one layer give, float64.

    Args:
        inputs: The rows' inputs, ``[tokens, in]`` each.
        power: ``[rows, out]``, Σ_t g_t² over the positions.
        fisher: ``[rows, formats]``, Σ (G ∘ D)².
        projection: ``[rows, formats]``, Σ_r (G_r · D_r)².
        signed: ``[rows, formats]``, Σ G ∘ D.
        trace: ``[rows]``, ‖G‖².
    """

    inputs: list[Tensor]
    power: Tensor
    fisher: Tensor
    projection: Tensor
    signed: Tensor
    trace: Tensor


def _gradient_terms(layer: LayerRows, errors: Tensor, metrics: Sequence[str]) -> _GradientTerms:
    """Terms of the rows' gradients with errors ``[out, formats, in]``; those that no metric wants are 0."""
    projects = any(metric != "kron" for metric in metrics)
    height, formats, width = errors.shape
    limit = _chunk_elements(errors)
    squares = errors.square() if "fisher" in metrics else None
    inputs: list[Tensor] = []
    powers, sums = [], []
    for rows in _batches(layer.rows, max(1, limit // (height * width))):
        inputs += [x for x, _ in rows]
        powers.append(torch.stack([g.float().square().sum(0).double() / layer.positions for _, g in rows]))
        total = errors.new_zeros(3 * formats + 1, len(rows), dtype=torch.float64)
        for part in torch.arange(height).split(max(1, limit // (len(rows) * width))) if projects else ():
            outputs = slice(int(part[0]), int(part[-1]) + 1)
            gradients = errors.new_empty(len(rows), len(part), width)
            for gradient, (x, g) in zip(gradients, rows, strict=True):
                token_product(g[:, outputs], x, out=gradient)
            projected = torch.bmm(errors[outputs], gradients.permute(1, 2, 0)).double()
            gradients.square_()
            fisher = errors.new_zeros(formats, len(rows))
            if squares is not None:
                fisher = torch.bmm(squares[outputs], gradients.permute(1, 2, 0)).sum(0)
            trace = gradients.sum(2).sum(1, keepdim=True).t()
            total += torch.cat([fisher, projected.square().sum(0), projected.sum(0), trace])
        sums.append(total)
    fisher, projection, signed, trace = torch.cat(sums, 1).t().split([formats, formats, formats, 1], 1)
    return _GradientTerms(inputs, torch.cat(powers), fisher, projection, signed, trace[:, 0])


def experts_together(errors: Sequence[Mapping[str, Tensor]]) -> int:
    """How many experts `score_experts` takes, by the errors of one: the same on all ranks."""
    elements = sum(len(by_label) * next(iter(by_label.values())).numel() for by_label in errors)
    return max(1, _chunk_elements(next(iter(errors[0].values()))) // max(elements, 1))


def score_experts(
    layers: Sequence[Sequence[LayerRows]],
    errors: Sequence[Sequence[Mapping[str, Tensor]]],
    metrics: Sequence[str] = SWEEP_METRICS,
    ranks: Ranks = ALONE,
) -> list[RowValues]:
    """Sums over experts of what `score_rows` gives for each of the layers that share their input.

    Each expert sees few tokens, so that D x of each token is less work than the second moments of the inputs, and a
    GPU would wait for launches if experts came one by one.

    Args:
        layers: Per expert, the layers that share its input; those of all experts are of one form, on the same rows.
        errors: Per expert and layer, format label to D.
        metrics: As for `score_rows`.
        ranks: As for `score_rows`.
    """
    seen = [[list(layer.rows) for layer in of_expert] for of_expert in layers]
    inputs = [[x for x, _ in of_expert[0]] for of_expert in seen]
    like, rows = next(iter(errors[0][0].values())), len(inputs[0])
    counts = torch.tensor([[len(x) for x in of_expert] for of_expert in inputs], dtype=torch.float64)
    tokens = ranks.mean(counts.mean(1), rows).to(like.device)
    mean_tokens = torch.where(tokens > 0, tokens, 1 / rows)[:, None, None]
    values: list[RowValues] = []
    for index, layer in enumerate(layers[0]):
        stacked = [torch.stack([e.float() for e in of_expert[index].values()], 1) for of_expert in errors]
        error, own_rows = torch.stack(stacked), [of_expert[index] for of_expert in seen]
        power = torch.stack([_row_powers(of_expert) for of_expert in own_rows]) / layer.positions
        mean_power = ranks.mean(power.mean(1), rows)
        terms = _expert_gradient_terms(own_rows, error, metrics) / (2 * layer.outputs)
        projection, signed, fisher, trace = terms.split([error.shape[2]] * 3 + [1], 1)
        norms = torch.linalg.vector_norm(error, dim=(1, 3)).double().square()[:, :, None]
        found = {
            "fisher": fisher.sum(0),
            "projection": projection.sum(0),
            SIGNED: signed.sum(0) * 2 * layer.outputs**0.5,
            "hawq-ggn": (trace * norms).sum(0) / error[0, :, 0].numel(),
        }
        if "kron" in metrics:
            squares = torch.stack([_squared_products(x, e) for x, e in zip(inputs, error, strict=True)])
            own = ranks.mean(squares.mean(1), rows)
            product = power @ own + (squares * mean_power[:, None, :, None]).sum(2) - mean_power[:, None] @ own
            found["kron"] = (product * layer.positions / (2 * layer.outputs * mean_tokens)).sum(0).t()
        projects = any(metric != "kron" for metric in metrics)
        wanted = {name: v.cpu() for name, v in found.items() if name in metrics or (name == SIGNED and projects)}
        values.append({name: dict(zip(errors[0][index], v, strict=True)) for name, v in wanted.items()})
    return values


def _row_powers(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ_t g_t² of the tokens of each row, ``[rows, out]`` float64."""
    squares = torch.cat([g for _, g in rows]).float().square()
    return torch.stack([part.sum(0) for part in squares.split([len(g) for _, g in rows])]).double()


def _squared_products(inputs: Sequence[Tensor], error: Tensor) -> Tensor:
    """Σ_t (D_r · x_t)² of the tokens of each row, ``[rows, out, formats]`` float64, of ``[out, formats, in]``.

    Tensor cores may multiply in TF32, whose roundings average out; inputs of half precision are exact there.
    """
    x, flat = torch.cat(list(inputs)).float(), error.flatten(0, 1)
    step, sums = max(1, _chunk_elements(error) // max(len(x), 1)), []
    for part in flat.split(step):
        with coarse_products() if error.is_cuda else nullcontext():
            squares = (x @ part.t()).square_()
        sums.append(torch.stack([of_row.sum(0) for of_row in squares.split([len(row) for row in inputs])]))
    return torch.cat(sums, 1).double().unflatten(1, error.shape[:2])


def _expert_gradient_terms(
    seen: Sequence[Sequence[tuple[Tensor, Tensor]]], errors: Tensor, metrics: Sequence[str]
) -> Tensor:
    """Terms of the rows' gradients as of `_GradientTerms`, ``[experts, 3 formats + 1, rows]`` float64.

    They are projection, signed change and Fisher term of every format, and the trace; those not wanted are 0.

    Args:
        seen: Per expert and row, inputs and gradients.
        errors: ``[experts, out, formats, in]`` float32.
        metrics: Those wanted.
    """
    experts, height, formats, width = errors.shape
    rows = len(seen[0])
    total = errors.new_zeros(experts, 3 * formats + 1, rows, dtype=torch.float64)
    if all(metric == "kron" for metric in metrics):
        return total
    flat = errors.flatten(0, 1)
    squares = flat.square() if "fisher" in metrics else None
    step = max(1, _chunk_elements(errors) // (experts * height * width))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        gradients = errors.new_empty(experts, part.stop - first, height, width)
        for of_expert, own in zip(gradients, seen, strict=True):
            for gradient, (x, g) in zip(of_expert, own[part], strict=True):
                token_product(g, x, out=gradient)
        by_output = gradients.permute(0, 2, 3, 1).flatten(0, 1).contiguous()
        projected = torch.bmm(flat, by_output).double().unflatten(0, (experts, height))
        by_output.square_()
        total[:, :formats, part] = projected.square().sum(1)
        total[:, formats : 2 * formats, part] = projected.sum(1)
        if squares is not None:
            fisher = torch.bmm(squares, by_output).unflatten(0, (experts, height))
            total[:, 2 * formats : 3 * formats, part] = fisher.sum(1).double()
        total[:, 3 * formats, part] = by_output.sum(1).unflatten(0, (experts, height)).sum(1).double()
    return total


def _input_terms(
    inputs: Sequence[Tensor], errors: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """What the errors D make of the inputs, through the second moments H_n = Σ_t x_t x_tᵀ of the rows.

    That is Σ_r w_r (D H_n Dᵀ)_rr = ⟨Dᵀ diag(w) D, H_n⟩: one product of tokens serves all layers and formats.
    H_n is symmetric, so only its panels on and to the right of the diagonal are computed.

    Args:
        inputs: ``[tokens, in]`` per row.
        errors: Per layer ``[out, formats, in]`` float32.
        weights: Per layer w, ``[out]``.

    Returns:
        Per layer the mean over rows of (D H_n Dᵀ)_rr, ``[out, formats]``, and Σ_r w_r (D H_n Dᵀ)_rr,
        ``[rows, formats]``, float64.
    """
    width, counts = inputs[0].shape[1], [error.shape[1] for error in errors]
    own = [error.new_zeros(error.shape[:2], dtype=torch.float64) for error in errors]
    weighted = errors[0].new_zeros(len(inputs), sum(counts), dtype=torch.float64)
    for first in range(0, width, GRAM_PANEL):
        panel = slice(first, min(first + GRAM_PANEL, width))
        # What lies off the diagonal's panel stands for its mirror image, too.
        twice = errors[0].new_full((width - first,), 2.0)
        twice[: panel.stop - first] = 1.0
        forms = torch.cat([_weighted_squares(e, w, panel) for e, w in zip(errors, weights, strict=True)]) * twice
        total = torch.zeros_like(forms[0])
        size = max(1, _chunk_elements(total) // total.numel())
        for start in range(0, len(inputs), size):
            rows = inputs[start : start + size]
            moments = total.new_empty(len(rows), *total.shape)
            for moment, x in zip(moments, rows, strict=True):
                token_product(x[:, panel], x[:, first:], out=moment)
            weighted[start : start + size] += moments.flatten(1) @ forms.flatten(1).t()
            total += moments.sum(0)
        total *= twice / len(inputs)
        for sums, error in zip(own, errors, strict=True):
            for label in range(error.shape[1]):
                sums[:, label] += ((error[:, label, panel] @ total) * error[:, label, first:]).sum(1)
    return list(zip(own, weighted.split(counts, 1), strict=True))


def _weighted_squares(error: Tensor, weights: Tensor, panel: slice) -> Tensor:
    """Dᵀ diag(w) D, its rows of a panel from the diagonal on: ``[formats, panel, columns]``."""
    left = error[:, :, panel] * weights.to(error.dtype)[:, None, None]
    return torch.bmm(left.permute(1, 2, 0), error[:, :, panel.start :].transpose(0, 1))


def _chunk_elements(like: Tensor) -> int:
    return _GPU_CHUNK_ELEMENTS if like.is_cuda else _CHUNK_ELEMENTS


def _batches(rows: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def add_rows(into: RowValues, values: RowValues) -> None:
    """Add a member's row values to its unit's."""
    for metric, by_label in values.items():
        for label, rows in by_label.items():
            held = into.setdefault(metric, {})
            held[label] = held[label] + rows if label in held else rows


def to_scores(values: RowValues) -> UnitScores:
    """Means and standard errors over rows."""
    return {
        metric: {label: mean_score(rows) for label, rows in by_label.items()}
        for metric, by_label in values.items()
        if metric != SIGNED
    }


def mean_score(rows: Tensor) -> Score:
    """Mean of ``[rows]`` and its standard error, NaN for a single row."""
    count = len(rows)
    spread = float(rows.std(correction=1)) if count > 1 else float("nan")
    return Score(float(rows.mean()), spread / count**0.5)
