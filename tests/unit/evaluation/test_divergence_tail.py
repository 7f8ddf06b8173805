"""The tail of an evaluation against numpy: percentiles over outputs, and flips of what the original is sure of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hawqtool.evaluation.divergence import CONFIDENT, Tail, _compare_logits
from hawqtool.report.wording import tail_text


def test_percentiles_and_flips_are_those_of_all_outputs_together() -> None:
    generator = torch.Generator().manual_seed(0)
    original = 6 * torch.randn(3000, 7, generator=generator)
    candidate = original + torch.randn(3000, 7, generator=generator)
    tail = Tail()
    parts = [_compare_logits(p, q, tail) for p, q in zip(original.split(700), candidate.split(700), strict=True)]
    p, q = (np.exp(x.double().numpy()) for x in (original, candidate))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl, sure = np.sort((p * np.log(p / q)).sum(1)), p.max(1) >= CONFIDENT
    found = tail.figures()
    assert found["kl_p99"] == pytest.approx(kl[2969], rel=1e-4)  # the 2970th of 3000
    assert found["kl_p999"] == pytest.approx(kl[2996], rel=1e-4)
    assert found["flips"] == (sure & (p.argmax(1) != q.argmax(1))).sum() / sure.sum() > 0
    shares = np.array([700, 700, 700, 700, 200]) / 3000
    assert sum(s * part["divergence"] for s, part in zip(shares, parts, strict=True)) == pytest.approx(kl.mean(), 1e-5)


def test_nothing_sure_has_no_share_and_encoders_have_no_tail() -> None:
    tail = Tail()
    assert tail.figures() == {}
    _compare_logits(torch.zeros(5, 3), torch.zeros(5, 3), tail)
    assert tail.figures() == {"kl_p99": 0.0, "kl_p999": 0.0, "flips": None}
    assert tail_text({"num_tokens": 5, "cosine": 1.0}) is None
    text = tail_text({"num_tokens": 5, "kl_p99": 0.25, "kl_p999": 1.5, "flips": 0.0125})
    assert (
        text == "1 output in 100 has a KL of 0.25 or more, 1 in 1000 1.5; 1.25 % of the outputs that the original "
        "is sure of changed"
    )
