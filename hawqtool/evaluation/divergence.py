"""Perplexity of a model and its divergence from the original."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.model.sweep import ModelStream
from hawqtool.records import Evaluation


def evaluate_hidden(stream: ModelStream, tokens: Tensor, original: Tensor, candidate: Tensor) -> Evaluation:
    """Compare two models by the outputs of their last blocks; norm and head are the stream's (never quantized).

    KL is E_t[KL(p_original || p_candidate)] over all positions of a row; rows give its standard error. Logits
    exist for one row at a time.

    Args:
        stream: Any stream of the model; only its norm and head are used.
        tokens: ``[rows, seq_len]``.
        original: ``[rows, seq_len, width]``, last block's output of the original model.
        candidate: The same of the model to judge.

    Raises:
        NumericalError: If the candidate's logits are not finite.
    """
    row_kl, row_nll, row_same = [], [], []
    with torch.no_grad():
        for row, reference, state in zip(tokens, original, candidate, strict=True):
            log_p = stream.logits(row[None], reference[None])[0].float().log_softmax(-1)
            log_q = stream.logits(row[None], state[None])[0].float().log_softmax(-1)
            row_kl.append(float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean()))
            row_same.append(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
            row_nll.append(float(nn.functional.nll_loss(log_q[:-1], row[1:].to(log_q.device))))
    kl = torch.tensor(row_kl, dtype=torch.float64)
    if not bool(torch.isfinite(kl).all()):
        raise NumericalError("the model to evaluate gives logits that are NaN or Inf")
    return Evaluation(
        perplexity=math.exp(sum(row_nll) / len(row_nll)),
        kl=float(kl.mean()),
        kl_stderr=standard_error(kl),
        same_top=sum(row_same) / len(row_same),
        num_tokens=tokens.numel(),
        row_kl=tuple(row_kl),
    )


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``[n]`` values; NaN for a single one."""
    return float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def paired_difference(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """Mean of ``first - second`` in KL over rows and its standard error; both on the same rows."""
    difference = torch.tensor(first.row_kl, dtype=torch.float64) - torch.tensor(second.row_kl, dtype=torch.float64)
    return float(difference.mean()), standard_error(difference)


def interpolate_log_kl(points: list[tuple[int, float]], stored_bytes: int) -> float | None:
    """KL of the uniform curve at ``stored_bytes``: log-linear between the neighbouring points.

    Returns:
        None when the bytes lie outside the points.
    """
    below = max((p for p in points if p[0] <= stored_bytes), default=None)
    above = min((p for p in points if p[0] >= stored_bytes), default=None)
    if below is None or above is None:
        return None
    if above[0] == below[0]:
        return below[1]
    share = (stored_bytes - below[0]) / (above[0] - below[0])
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))
