"""What encoders of sounds hold beside plain linears: distances of frames, and biases by head that blocks hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.kept import POSITIONS
from hawqtool.pipeline.run.job import prepare
from tests.support.tiny_zoo import kind_named


def saved(folder: Path, config: str, model: str, **settings: Any) -> Path:
    sizes = kind_named("wav2vec2").settings | settings
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    built.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_linears_that_see_distances_between_frames_are_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", position_embeddings_type="relative")
    structure = prepare(RunConfig(model=str(folder), device="cpu", group_size=32)).structure
    kept = {tensor.name: tensor.reason for tensor in structure.kept}
    distances = [name for name in kept if name.endswith("linear_pos.weight")]
    assert len(distances) == 2 and {kept[name] for name in distances} == {POSITIONS}
    assert not any(name.endswith("linear_pos") for name in structure.linears)


def test_rows_and_heads_in_one_dimension_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "WavLMConfig", "WavLMForCTC")
    with pytest.raises(InputError, match="rows and heads in one dimension"):
        prepare(RunConfig(model=str(folder), device="cpu", group_size=32))
