"""Predicted loss of rounding one layer, from its inputs, output gradients and rounding errors.

The loss is the negative log-likelihood of labels sampled from the model's own softmax at every position, summed
over the T positions of a row. Its gradient is an unbiased probe of the Fisher matrix F, and to second order
KL(original || rounded) = ½ vec(D)ᵀ F vec(D). All scores are nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hawqtool.records import Score

RowValues = dict[str, dict[str, Tensor]]
"""``[metric][format label]`` to ``[rows]`` float64; the mean over rows is the score."""


def score_rows(inputs: Tensor, output_grads: Tensor, errors: Mapping[str, Tensor]) -> RowValues:
    """Every metric of one layer for every format, row by row.

    With G_n = Σ_t g_t x_tᵀ the gradient of row n, D the rounding error and n the number of weights:

    - ``fisher``: 1/(2T) E Σ (G ∘ D)², the diagonal of F times the real error;
    - ``hawq-ggn``: ½ E‖G‖² / (T n) · ‖D‖², HAWQ-V2's form (Dong et al. 2020, eq. 11) with the Gauss-Newton trace;
    - ``kron``: ½ Σ_r E[g_r²] (D H Dᵀ)_rr with H = E[x xᵀ]; (D H Dᵀ)_rr is the mean of (D_r · x_t)².

    ``kron`` is a product of two means, so its row values are linearised: they average to the score, and their
    spread is that of the score to first order.

    Args:
        inputs: ``[rows, T, in]``, inputs of the layer on the scoring rows.
        output_grads: ``[rows, T, out]``, gradients of each row's summed loss at the layer's output.
        errors: Format label to D = Q(W) - W, ``[out, in]`` float32.
    """
    rows, seq_len, _ = inputs.shape
    labels = list(errors)
    squared = torch.stack([errors[label].float().square().flatten() for label in labels])
    totals = squared.double().sum(1)
    gradient_power = output_grads.float().square().mean(1).double()
    fisher = torch.empty(rows, len(labels), dtype=torch.float64, device=inputs.device)
    trace = torch.empty(rows, dtype=torch.float64, device=inputs.device)
    for row in range(rows):
        gradient = (output_grads[row].float().t() @ inputs[row].float()).square_().flatten()
        fisher[row] = (squared @ gradient).double() / (2 * seq_len)
        trace[row] = gradient.sum(dtype=torch.float64)
    num_weights = squared.shape[1]
    values: RowValues = {"fisher": {}, "kron": {}, "hawq-ggn": {}}
    for position, label in enumerate(labels):
        values["fisher"][label] = fisher[:, position].cpu()
        values["hawq-ggn"][label] = (trace * totals[position] / (2 * seq_len * num_weights)).cpu()
        power = torch.stack([(x.float() @ errors[label].float().t()).square_().mean(0) for x in inputs]).double()
        values["kron"][label] = _linearised_product(gradient_power, power).cpu()
    return values


def _linearised_product(left: Tensor, right: Tensor) -> Tensor:
    """Row values of ½ Σ_r mean(left)_r mean(right)_r, both ``[rows, out]`` float64."""
    mean_left, mean_right = left.mean(0), right.mean(0)
    return 0.5 * (left @ mean_right + right @ mean_left - mean_left @ mean_right)


def add_rows(into: RowValues, values: RowValues) -> None:
    """Add a member's row values to its unit's."""
    for metric, by_label in values.items():
        for label, rows in by_label.items():
            held = into.setdefault(metric, {})
            held[label] = held[label] + rows if label in held else rows


def to_scores(values: RowValues) -> dict[str, dict[str, Score]]:
    """Means and standard errors over rows."""
    return {
        metric: {label: _score(rows) for label, rows in by_label.items()} for metric, by_label in values.items()
    }


def _score(rows: Tensor) -> Score:
    count = len(rows)
    spread = float(rows.std(correction=1)) if count > 1 else float("nan")
    return Score(float(rows.mean()), spread / count**0.5)
