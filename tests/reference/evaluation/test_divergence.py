"""Divergence, perplexity and standard errors against the logits of live models in float64, by plain loops."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison, as_record, paired_difference, perplexity
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import Evaluation
from hawqtool.streaming import stream
from tests.support.tiny import tiny_model

ROWS, LENGTH = 5, 20
TOKENS = torch.randint(3, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """The original and two candidates, which are other models altogether: large differences show in every figure."""
    place = tmp_path_factory.mktemp("divergence")
    folders = [tiny_model("llama", place / str(seed), torch.float32, layers=1, seed=seed) for seed in range(3)]
    return [prepare(RunConfig(model=str(folder), device="cpu")) for folder in folders]


def evaluated(original: Job, candidate: Job) -> Evaluation:
    own, other = original.stream(), candidate.stream()
    states, hidden = (one.final_hidden(TOKENS, 2, lambda _: None) for one in (own, other))
    return OutputComparison(own, other, TOKENS, states).evaluation(hidden)


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(TOKENS).logits.log_softmax(-1)


def slow_divergence(p: Tensor, q: Tensor) -> list[float]:
    """KL(p || q) of every row, the mean over its positions."""
    by_position = [
        [float((a.exp() * (a - b)).sum()) for a, b in zip(*row, strict=True)] for row in zip(p, q, strict=True)
    ]
    return [sum(row) / LENGTH for row in by_position]


@pytest.mark.parametrize("positions", [128, 7, 1])
def test_figures_are_those_of_the_logits(jobs: list[Job], positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_POSITIONS", positions)
    found = evaluated(jobs[0], jobs[1])
    p, q = (logits(job.index.folder) for job in jobs[:2])
    rows = slow_divergence(p, q)
    assert found.row_divergence == pytest.approx(rows, rel=1e-5)
    assert found.divergence == pytest.approx(statistics.mean(rows), rel=1e-5)
    assert found.stderr == pytest.approx(statistics.stdev(rows) / math.sqrt(ROWS), rel=1e-4)
    # Position t predicts token t + 1; the first token is predicted by none.
    losses = [-float(q[row, t, TOKENS[row, t + 1]]) for row in range(ROWS) for t in range(LENGTH - 1)]
    assert found.perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-5)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.num_tokens == ROWS * LENGTH


def test_a_paired_difference_is_that_of_the_rows(jobs: list[Job]) -> None:
    first, second = (evaluated(jobs[0], job) for job in jobs[1:])
    p, one, other = (logits(job.index.folder) for job in jobs)
    pairs = zip(slow_divergence(p, one), slow_divergence(p, other), strict=True)
    differences = [a - b for a, b in pairs]
    value, stderr = paired_difference(first, second)
    assert value == pytest.approx(statistics.mean(differences), rel=1e-4)
    assert stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(ROWS), rel=1e-4)
    assert stderr != pytest.approx(math.hypot(first.stderr, second.stderr), rel=1e-2)


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    assert perplexity(2.0) == math.exp(2.0) and perplexity(709.5) == perplexity(1e9) == math.inf
    record = as_record(Evaluation("kl", 0.1, 0.1, (0.1,), 2, perplexity=math.inf))
    assert record == {"num_tokens": 2, "kl": 0.1, "kl_stderr": 0.1}, "JSON has no infinity"
