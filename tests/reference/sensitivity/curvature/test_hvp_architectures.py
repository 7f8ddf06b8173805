"""Every supported architecture has second derivatives: products of the streamed Hessian are symmetric."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.sensitivity.curvature.hvp import (
    DATA,
    OWN_OUTPUT,
    SAMPLED,
    Curvature,
    Inputs,
    Pass,
    Variables,
    Weights,
    products,
)
from tests.support.tiny_zoo import SUPPORTED, Kind, calibration_inputs, save_kind

LABELS = {"causal": DATA, "multimodal": DATA, "embedding": OWN_OUTPUT, "towers": OWN_OUTPUT} | dict.fromkeys(
    ("seq2seq", "masked", "image", "speech", "ctc"), SAMPLED
)

OF_INPUTS = ("llama", "gpt2", "mixtral", "t5", "vit", "gemma4-shared")
"""Kinds whose derivatives by inputs of linears are tried too: these pass through blocks as those by weights do."""


def vector(p: Pass, name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) + p.tag)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_the_hessian_is_symmetric(kind: Kind, tmp_path: Path) -> None:
    folder = save_kind(kind, tmp_path / "model")
    job = prepare(RunConfig(model=str(folder), device="cpu"), writes=False)
    source = Curvature(job.stream(dtype=torch.float64), calibration_inputs(kind)[:1], 0)
    assert source.labels == LABELS[kind.task]
    kinds: tuple[Variables, ...] = (Weights(), Inputs()) if kind.name in OF_INPUTS else (Weights(),)
    for variables in kinds:
        found = {0: 0.0, 1: 0.0}
        size = {0: 0.0, 1: 0.0}

        def visit(
            p: Pass,
            name: str,
            _v: Tensor,
            product: Tensor,
            found: dict[int, float] = found,
            size: dict[int, float] = size,
        ) -> None:
            values = vector(Pass(0, 1 - p.tag), name, product) * product
            found[p.tag] += float(values.sum())
            size[p.tag] += float(values.square().sum())

        products(source, variables, [Pass(0, 0), Pass(0, 1)], vector, visit)
        scale = max(size.values()) ** 0.5
        assert scale > 0
        # Norms in float32 inside many models limit the agreement.
        assert abs(found[0] - found[1]) < 1e-4 * scale
