"""Accuracy on multiple-choice questions, the original's and a candidate's on the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hawqtool.data.choices import Question
from hawqtool.evaluation.divergence import standard_error
from hawqtool.report.plan_comparison import TaskResult
from hawqtool.streaming.stream import ModelStream

TOKENS_TOGETHER = 1 << 18
"""Most padded tokens of a walk through the model: their hidden states are in memory together."""


def answers(
    stream: ModelStream, questions: Sequence[Question], batch_size: int, progress: Callable[[int], None]
) -> Tensor:
    """Choice that a model takes for each question: the one of the largest log-probability after the input.

    Shorter rows are padded behind their end, which a causal model does not see.

    Args:
        stream: A causal language model.
        questions: What is asked.
        batch_size: Rows per forward pass.
        progress: Called with the number of every block that is done, in each walk.

    Returns:
        ``[questions]`` int64 on the CPU.
    """
    scores = [
        score for group in _groups(questions) for score in _log_probabilities(stream, group, batch_size, progress)
    ]
    found, first = [], 0
    for question in questions:
        found.append(int(torch.tensor(scores[first : first + len(question.rows)]).argmax()))
        first += len(question.rows)
    return torch.tensor(found)


def task_result(name: str, questions: Sequence[Question], original: Tensor, quantized: Tensor) -> TaskResult:
    """Accuracies with standard errors over questions, and their paired difference.

    Args:
        name: Of the task.
        questions: What was asked.
        original: ``[questions]``, choices of the original.
        quantized: ``[questions]``, choices of the quantized model.
    """
    right = torch.tensor([question.answer for question in questions])
    before, after = ((taken == right).double() for taken in (original, quantized))
    return {
        "name": name,
        "questions": len(questions),
        "original": float(before.mean()),
        "original_stderr": standard_error(before),
        "quantized": float(after.mean()),
        "quantized_stderr": standard_error(after),
        "difference": float((after - before).mean()),
        "difference_stderr": standard_error(after - before),
        "same": float((original == quantized).double().mean()),
    }


def _groups(questions: Sequence[Question]) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Rows with the starts of their choices, in order, so many that a padded group is not too large."""
    group: list[tuple[tuple[int, ...], int]] = []
    for question in questions:
        for row in zip(question.rows, question.starts, strict=True):
            longest = max(len(r) for r, _ in (*group, row))
            if group and longest * (len(group) + 1) > TOKENS_TOGETHER:
                yield group
                group = []
            group.append(row)
    yield group


def _log_probabilities(
    stream: ModelStream, rows: Sequence[tuple[tuple[int, ...], int]], batch_size: int, progress: Callable[[int], None]
) -> list[float]:
    """Log-probability of every row from its start on, float64."""
    length = max(len(row) for row, _ in rows)
    tokens = torch.tensor([list(row) + [row[-1]] * (length - len(row)) for row, _ in rows])
    with torch.no_grad():
        hidden = stream.final_hidden(tokens, batch_size, progress)
        return [_row_score(stream, tokens[i], hidden[i], len(row), start) for i, (row, start) in enumerate(rows)]


def _row_score(stream: ModelStream, tokens: Tensor, hidden: Tensor, length: int, start: int) -> float:
    logits = stream.outputs(tokens[None, :length], hidden[None, :length])[0]
    log_p = logits[start - 1 : length - 1].float().log_softmax(-1)
    return float(log_p.gather(-1, tokens[start:length, None].to(log_p.device)).double().sum())
