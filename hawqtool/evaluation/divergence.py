"""Perplexity of a model and its divergence from the original."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.records import Evaluation
from hawqtool.streaming.stream import ModelStream


def evaluate_hidden(
    reference: ModelStream, candidate: ModelStream, rows: Tensor, original: Tensor, hidden: Tensor
) -> Evaluation:
    """Compare two models by the outputs of their last blocks, each through its own norm and head.

    KL is E[KL(p_original || p_candidate)] over all outputs of a row; rows give its standard error. Logits exist
    for one row at a time at most.

    Args:
        reference: Stream of the original model.
        candidate: Stream of the model to judge.
        rows: ``[rows, seq_len]`` tokens, or images.
        original: ``[rows, positions, width]``, last block's output of the original model.
        hidden: The same of the model to judge.

    Raises:
        NumericalError: If the candidate's outputs are not finite.
    """
    results = []
    with torch.no_grad():
        for row, expected, state in zip(rows, original, hidden, strict=True):
            results.append(_compare_row(reference, candidate, row, expected, state))
    divergence = torch.tensor([values["divergence"] for values in results], dtype=torch.float64)
    if not bool(torch.isfinite(divergence).all()):
        raise NumericalError("the model to evaluate gives outputs that are NaN or Inf")
    means = {key: sum(values[key] for values in results) / len(results) for key in results[0]}
    return Evaluation(
        measure="kl" if reference.task.logits else "embedding_error",
        divergence=float(divergence.mean()),
        stderr=standard_error(divergence),
        row_divergence=tuple(divergence.tolist()),
        num_tokens=original.shape[0] * original.shape[1],
        perplexity=math.exp(means["next_token"]) if "next_token" in means else None,
        same_top=means.get("same_top"),
        cosine=means.get("cosine"),
    )


def _compare_row(
    reference: ModelStream, candidate: ModelStream, row: Tensor, original: Tensor, hidden: Tensor
) -> dict[str, float]:
    """Means over the outputs of a row; arguments as for `evaluate_hidden`."""
    compare, generates = _compare_logits if reference.task.logits else _compare_embeddings, reference.task.generates
    sums: dict[str, float] = defaultdict(float)
    for positions in reference.output_parts(len(original)):
        rows = row[None, positions] if generates else row[None]
        p, q = (s.outputs(rows, h[None, positions])[0].float() for s, h in ((reference, original), (candidate, hidden)))
        share = (positions.stop - positions.start) / len(original)
        for name, value in compare(p, q).items():
            sums[name] += share * value
        if generates:
            following = row[positions.start + 1 : positions.stop + 1].to(q.device)
            losses = nn.functional.cross_entropy(q[: len(following)], following, reduction="sum")
            sums["next_token"] += float(losses) / (len(row) - 1)
    return dict(sums)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities ``[..., outputs, classes]``, mean over outputs in nats; ``[...]`` float64."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().mean(-1)


def embedding_error(original: Tensor, candidate: Tensor) -> Tensor:
    """Squared error of embeddings ``[..., 1, width]`` over their squares; ``[...]`` float64."""
    return (candidate - original).double().square().sum((-2, -1)) / original.double().square().sum((-2, -1))


def _compare_logits(original: Tensor, candidate: Tensor) -> dict[str, float]:
    log_p, log_q = original.log_softmax(-1), candidate.log_softmax(-1)
    return {
        "divergence": float(kl_divergence(log_p, log_q)),
        "same_top": float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
    }


def _compare_embeddings(original: Tensor, candidate: Tensor) -> dict[str, float]:
    return {
        "divergence": float(embedding_error(original, candidate)),
        "cosine": float(nn.functional.cosine_similarity(original.double(), candidate.double(), dim=-1).mean()),
    }


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``[n]`` values; NaN for a single one."""
    return float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def paired_difference(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """Mean of ``first - second`` in divergence over rows and its standard error; both on the same rows."""
    rows = (torch.tensor(e.row_divergence, dtype=torch.float64) for e in (first, second))
    difference = next(rows) - next(rows)
    return float(difference.mean()), standard_error(difference)


def interpolate_log(points: list[tuple[int, float]], stored_bytes: int) -> float | None:
    """Divergence of the uniform curve at ``stored_bytes``: log-linear between the neighbouring points.

    Returns:
        None when the bytes lie outside the points, or a neighbour's divergence is not positive: of two models that
        agree, rounding errors of float32 are left, of either sign.
    """
    below = max((p for p in points if p[0] <= stored_bytes), default=None)
    above = min((p for p in points if p[0] >= stored_bytes), default=None)
    if below is None or above is None:
        return None
    if above[0] == below[0]:
        return below[1]
    if min(below[1], above[1]) <= 0:
        return None
    share = (stored_bytes - below[0]) / (above[0] - below[0])
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))


def as_evaluation(values: dict[str, Any]) -> Evaluation:
    """An evaluation from its saved fields."""
    return Evaluation(**values | {"row_divergence": tuple(values["row_divergence"])})


def as_record(evaluation: Evaluation) -> dict[str, Any]:
    """JSON form of an evaluation: the divergence under the name of its measure, without the row values."""
    others = {name: getattr(evaluation, name) for name in ("perplexity", "same_top", "cosine")}
    return {
        evaluation.measure: evaluation.divergence,
        f"{evaluation.measure}_stderr": evaluation.stderr,
        "num_tokens": evaluation.num_tokens,
    } | {name: value for name, value in others.items() if value is not None}
