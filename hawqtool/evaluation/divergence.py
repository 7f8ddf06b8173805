"""Perplexity of a model and its divergence from the original."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import NumericalError
from hawqtool.records import Evaluation
from hawqtool.report.plan_comparison import Quality
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.streaming.stream import ModelStream

CONFIDENT = 0.9
"""Least probability of the original's likeliest output for it to count as confident."""

HeadSwap = Callable[[str], AbstractContextManager[None]]
"""Name of a candidate to a context in which the output head is that of the candidate."""


_MOST_NATS = 709.0
"""Above this, exp exceeds the largest float64."""


@dataclass
class Tail:
    """Where a mean looks away: the worst outputs, and changed ones among those that the original is sure of."""

    divergences: list[Tensor] = field(default_factory=list)
    confident: int = 0
    flipped: int = 0

    def add(self, divergence: Tensor, confident: Tensor, same: Tensor) -> None:
        """Take outputs, all ``[outputs]``: KL in nats, whether the original is sure, whether the likeliest is its."""
        self.divergences.append(divergence.cpu())
        self.confident += int(confident.sum())
        self.flipped += int((confident & ~same).sum())

    def figures(self) -> dict[str, Any]:
        """99th and 99.9th percentile of KL over outputs (each an output's own value), and the share of flips."""
        if not self.divergences:
            return {}
        values = torch.cat(self.divergences)
        p99, p999 = (float(values.kthvalue(math.ceil(level * len(values))).values) for level in (0.99, 0.999))
        return {"kl_p99": p99, "kl_p999": p999, "flips": self.flipped / self.confident if self.confident else None}


def joined_tails(tails: Sequence[Tail]) -> Tail:
    """The tail of several sets of rows together."""
    divergences = [values for tail in tails for values in tail.divergences]
    return Tail(divergences, sum(tail.confident for tail in tails), sum(tail.flipped for tail in tails))


@dataclass(frozen=True)
class OutputComparison:
    """Divergence of models from the original by their outputs, from the last hidden states of both.

    It is KL(p_original || p_candidate) in nats, the mean over the outputs of a row, or the relative squared error of
    the embedding. Logits are large, so that they exist for a few rows at a time.

    Args:
        original: Stream of the original model.
        candidate: Stream of the model whose norm and head the candidates have; the original itself where only blocks
            differ.
        rows: ``[rows, seq_len]`` tokens, or images.
        states: ``[rows, positions, width]``, last block's output of the original model.
    """

    original: ModelStream
    candidate: ModelStream
    rows: Tensor
    states: Tensor

    def divergence(self, hidden: Tensor) -> Tensor:
        """Divergence of every row, ``[rows]`` float64 on the CPU.

        Args:
            hidden: ``[rows, positions, width]``, last block's output of a candidate.
        """
        with torch.no_grad():
            found = [self._divergence(self._expected(part), part, hidden[part]) for part in self._parts(1)]
        return torch.cat(found).cpu()

    def divergences(
        self, candidates: Mapping[str, Tensor], head: HeadSwap = lambda _: nullcontext()
    ) -> dict[str, Tensor]:
        """`divergence` of several candidates, whose outputs the original's are computed once for.

        Args:
            candidates: Last block's outputs by name.
            head: Gives the context in which the output head is that of a candidate (default: it has its own).
        """
        found: dict[str, list[Tensor]] = {name: [] for name in candidates}
        with torch.no_grad():
            for part in self._parts(self.candidate.rows_together(self.states.shape[1])):
                expected = self._expected(part)
                for name, hidden in candidates.items():
                    with head(name):
                        found[name].append(self._divergence(expected, part, hidden[part]))
        return {name: torch.cat(values).cpu() for name, values in found.items()}

    def divergences_by_parts(
        self, candidates: Mapping[str, Tensor], head: HeadSwap = lambda _: nullcontext()
    ) -> dict[str, Tensor]:
        """`divergences` with logits, on a CPU, of some positions of one row at a time; equal to those of `evaluation`.

        Args:
            candidates: Last block's outputs by name.
            head: As for `divergences`; entered behind the original's outputs, for which a stream that is both has
                loaded its head.
        """
        task, found = self.original.task, {name: [0.0] * len(self.rows) for name in candidates}
        compare = kl_divergence if task.logits else embedding_error
        with torch.no_grad():
            for number, (row, state) in enumerate(zip(self.rows, self.states, strict=True)):
                for positions in self.original.output_parts(len(state)):
                    rows = row[None, positions] if task.generates else row[None]
                    share = (positions.stop - positions.start) / len(state)
                    outputs = self.original.outputs(rows, state[None, positions])[0].float()
                    expected = _normalized(self.original, outputs)
                    for name, hidden in candidates.items():
                        with head(name):
                            outputs = self.candidate.outputs(rows, hidden[number][None, positions])[0].float()
                        value = compare(expected, _normalized(self.candidate, outputs))
                        found[name][number] += share * float(value)
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}

    def gradient(self, hidden: Tensor) -> Tensor:
        """Gradient of the mean divergence over the rows at ``hidden``, of its shape and dtype."""
        found = []
        for part in self._parts(1):
            with torch.no_grad():
                expected = self._expected(part)
            leaf = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                found.append(torch.autograd.grad(self._divergence(expected, part, leaf).sum(), leaf)[0])
        return torch.cat(found) / len(hidden)

    def evaluation(self, hidden: Tensor, ranks: Ranks = ALONE) -> Evaluation:
        """Divergence with its standard error over rows, perplexity, and how often the likeliest outputs agree.

        On a CPU logits exist for some positions of one row at a time.

        Args:
            hidden: ``[rows, positions, width]``, last block's output of the candidate.
            ranks: Processes that share the rows, each with some of them; the result is of all.

        Raises:
            NumericalError: If the candidate's outputs are not finite.
        """
        tail = Tail()
        with torch.no_grad():
            same = hidden is self.states and self.candidate is self.original
            results = [self._row(*row, tail, same) for row in zip(self.rows, self.states, hidden, strict=True)]
        shares = ranks.everywhere((results, tail))
        results, tail = [values for part, _ in shares for values in part], joined_tails([t for _, t in shares])
        divergence = torch.tensor([values["divergence"] for values in results], dtype=torch.float64)
        if not bool(torch.isfinite(divergence).all()):
            raise NumericalError("the model to evaluate gives outputs that are NaN or Inf")
        means = {key: sum(values[key] for values in results) / len(results) for key in results[0]}
        return Evaluation(
            measure="kl" if self.original.task.logits else "embedding_error",
            divergence=float(divergence.mean()),
            stderr=standard_error(divergence),
            row_divergence=tuple(divergence.tolist()),
            num_tokens=len(results) * self.states.shape[1],
            perplexity=perplexity(means["next_token"]) if "next_token" in means else None,
            same_top=means.get("same_top"),
            cosine=means.get("cosine"),
            **tail.figures(),
        )

    def _parts(self, together: int) -> list[slice]:
        """All rows, so many at a time."""
        return [slice(first, first + together) for first in range(0, len(self.rows), together)]

    def _expected(self, part: slice) -> Tensor:
        """The original's outputs of some rows, ``[rows, outputs, classes or width]`` float32."""
        return _normalized(self.original, self.original.outputs(self.rows[part], self.states[part]).float())

    def _divergence(self, expected: Tensor, part: slice, hidden: Tensor) -> Tensor:
        outputs = self.candidate.outputs(self.rows[part], hidden).float()
        compare = kl_divergence if self.original.task.logits else embedding_error
        return compare(expected, _normalized(self.candidate, outputs))

    def _row(self, row: Tensor, state: Tensor, hidden: Tensor, tail: Tail, same: bool) -> dict[str, float]:
        """Means over the outputs of a row.

        Args:
            row: Its tokens, or an image.
            state: The original's last hidden states.
            hidden: The candidate's.
            tail: Takes its single outputs.
            same: Whether the candidate is the original.
        """
        task = self.original.task
        compare = partial(_compare_logits, tail=tail) if task.logits else _compare_embeddings
        sums: dict[str, float] = defaultdict(float)
        for positions in self.original.output_parts(len(state)):
            rows = row[None, positions] if task.generates else row[None]
            p = self.original.outputs(rows, state[None, positions])[0].float()
            # The original compared with itself needs its outputs once.
            q = p if same else self.candidate.outputs(rows, hidden[None, positions])[0].float()
            share = (positions.stop - positions.start) / len(state)
            for name, value in compare(p, q).items():
                sums[name] += share * value
            if task.generates:
                following = row[positions.start + 1 : positions.stop + 1].to(q.device)
                losses = nn.functional.cross_entropy(q[: len(following)], following, reduction="sum")
                sums["next_token"] += float(losses) / (len(row) - 1)
        return dict(sums)


def _normalized(stream: ModelStream, outputs: Tensor) -> Tensor:
    """Log-probabilities of logits; embeddings as they are."""
    return outputs.log_softmax(-1) if stream.task.logits else outputs


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities ``[..., outputs, classes]``, mean over outputs in nats; ``[...]`` float64."""
    return _output_kl(log_p, log_q).mean(-1)


def _output_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).double()


def embedding_error(original: Tensor, candidate: Tensor) -> Tensor:
    """Squared error of embeddings ``[..., 1, width]`` over their squares; ``[...]`` float64."""
    return (candidate - original).double().square().sum((-2, -1)) / original.double().square().sum((-2, -1))


def _compare_logits(original: Tensor, candidate: Tensor, tail: Tail) -> dict[str, float]:
    log_p, log_q = original.log_softmax(-1), candidate.log_softmax(-1)
    divergence, same = _output_kl(log_p, log_q), log_p.argmax(-1) == log_q.argmax(-1)
    tail.add(divergence, log_p.amax(-1).exp() >= CONFIDENT, same)
    return {"divergence": float(divergence.mean()), "same_top": float(same.double().mean())}


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


def perplexity(nats: float) -> float:
    """Exp of a mean negative log-likelihood per token in nats; infinite where float64 holds no such number."""
    return math.exp(nats) if nats <= _MOST_NATS else math.inf


def as_evaluation(values: dict[str, Any]) -> Evaluation:
    """An evaluation from its saved fields."""
    return Evaluation(**values | {name: tuple(values[name]) for name in ("row_divergence", "sources")})


def as_record(evaluation: Evaluation) -> Quality:
    """JSON form of an evaluation: the divergence under the name of its measure, without the row values."""
    found: Quality = {"num_tokens": evaluation.num_tokens}
    if evaluation.measure == "kl":
        found |= {"kl": evaluation.divergence, "kl_stderr": evaluation.stderr}
    else:
        found |= {"embedding_error": evaluation.divergence, "embedding_error_stderr": evaluation.stderr}
    if evaluation.perplexity is not None and math.isfinite(evaluation.perplexity):  # JSON has no infinity
        found["perplexity"] = evaluation.perplexity
    if evaluation.same_top is not None:
        found["same_top"] = evaluation.same_top
    if evaluation.cosine is not None:
        found["cosine"] = evaluation.cosine
    if evaluation.kl_p99 is not None and evaluation.kl_p999 is not None:
        found |= {"kl_p99": evaluation.kl_p99, "kl_p999": evaluation.kl_p999}
    if evaluation.flips is not None:
        found["flips"] = evaluation.flips
    return found
