"""Rows that distillation holds out are not seen by the rounding before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.data.tokens import fingerprint
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.refine import is_held_out
from hawqtool.pipeline.stages.round_blocks import round_blocks
from hawqtool.records import RoundedLayer, Rows
from tests.support.tiny import tiny_model


class Codes:
    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}

    def write_layer(self, layer: RoundedLayer) -> None:
        self.layers[layer.name] = torch.as_tensor(layer.codes).clone()

    def write_changed(self, name: str, tensor: Tensor) -> None:
        raise AssertionError


def rounded(model: Path, tokens: Tensor, **config: Any) -> dict[str, Tensor]:
    job = prepare(
        RunConfig(model=str(model), device="cpu", batch_size=4, token_importance="none", **config), writes=False
    )
    sink = Codes()
    round_blocks(job, uniform_formats(job.units, 3, 32), Rows(tokens, "t", fingerprint(tokens)), sink, lambda *_: None)
    return sink.layers


def test_rounding_before_distillation_sees_the_rows_that_it_learns_from_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    tokens = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    seen = rounded(model, tokens, distill_steps=4)
    held_out = is_held_out(len(tokens))
    other = tokens.clone()
    other[held_out] = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    assert held_out.sum() == 2
    again, whole = rounded(model, other, distill_steps=4), rounded(model, tokens)
    for name, codes in rounded(model, tokens[~held_out]).items():
        assert torch.equal(seen[name], codes) and torch.equal(again[name], codes)
    assert any(not torch.equal(seen[name], codes) for name, codes in whole.items())
