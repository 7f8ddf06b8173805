"""Predicted loss of rounding one layer, from its inputs, output gradients and rounding errors.

The loss is the negative log-likelihood of labels sampled from the model's own softmax at every output, summed over
the outputs of a row. Its gradient is an unbiased probe of the Fisher matrix F, and to second order
KL(original || rounded) = ½ vec(D)ᵀ F vec(D). All scores are nats per output (per token for language models), or
for embedding models the relative squared error of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.records import SWEEP_METRICS, Score

RowValues = dict[str, dict[str, Tensor]]
"""``[metric][format label]`` to ``[rows]`` float64; the mean over rows is the score."""

SIGNED = "signed"
"""Beside the metrics, what pair terms between units need: Σ G_n ∘ D / √m of each row, a signed first-order change."""


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


def score_rows(layer: LayerRows, errors: Mapping[str, Tensor]) -> RowValues:
    """Every metric of one layer for every format, row by row.

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
        layer: Inputs and gradients on the scoring rows.
        errors: Format label to D = Q(W) - W, ``[out, in]`` float32.
    """
    labels = list(errors)
    squared = torch.stack([errors[label].float().square().flatten() for label in labels])
    totals = squared.double().sum(1).cpu()
    fisher, projection, signed, trace, gradient_power, error_power, seen = [], [], [], [], [], [], 0
    for x, g in layer.rows:
        x, g = x.float(), g.float()
        gradient = g.t() @ x
        projected = torch.stack([(gradient * errors[label]).sum(1).double() for label in labels])
        projection.append(projected.square().sum(1))
        signed.append(projected.sum(1))
        gradient = gradient.square_().flatten()
        fisher.append((squared @ gradient).double())
        trace.append(gradient.sum(dtype=torch.float64))
        gradient_power.append(g.square().sum(0).double() / layer.positions)
        error_power.append(torch.stack([(x @ errors[label].float().t()).square().sum(0).double() for label in labels]))
        seen += len(x)
    # Sums over the tokens seen divided by all positions are p times the mean over those seen; one of the two
    # factors of kron needs to be that mean itself.
    mean_tokens = max(seen, 1) / len(fisher)
    left, right = torch.stack(gradient_power), torch.stack(error_power) / mean_tokens
    scale = 2 * layer.outputs
    values: RowValues = {name: {} for name in (*SWEEP_METRICS, SIGNED)}
    for position, label in enumerate(labels):
        values["fisher"][label] = torch.stack(fisher)[:, position].cpu() / scale
        values["projection"][label] = torch.stack(projection)[:, position].cpu() / scale
        values[SIGNED][label] = torch.stack(signed)[:, position].cpu() / layer.outputs**0.5
        values["hawq-ggn"][label] = torch.stack(trace).cpu() * totals[position] / (scale * squared.shape[1])
        kron = _linearised_product(left, right[:, position]) * layer.positions / scale
        values["kron"][label] = kron.cpu()
    return values


def _linearised_product(left: Tensor, right: Tensor) -> Tensor:
    """Row values of Σ_r mean(left)_r mean(right)_r, both ``[rows, out]`` float64."""
    mean_left, mean_right = left.mean(0), right.mean(0)
    return left @ mean_right + right @ mean_left - mean_left @ mean_right


def add_rows(into: RowValues, values: RowValues) -> None:
    """Add a member's row values to its unit's."""
    for metric, by_label in values.items():
        for label, rows in by_label.items():
            held = into.setdefault(metric, {})
            held[label] = held[label] + rows if label in held else rows


def to_scores(values: RowValues) -> dict[str, dict[str, Score]]:
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
