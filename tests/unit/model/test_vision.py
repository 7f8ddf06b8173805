"""Language models that read images: what stands for an image in a row, and which models cannot be walked so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hawqtool.errors import UsageError
from hawqtool.model.inputs.arguments import model_inputs, row_format
from hawqtool.model.skeleton import build_skeleton
from hawqtool.model.tasks import model_images, model_task
from hawqtool.model.vision import read_images
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import IMAGE_TOKEN, VISION, calibration_inputs, kind_named, save_kind


def test_an_image_takes_as_many_tokens_as_the_tower_makes_of_it(tmp_path: Path) -> None:
    model = build_skeleton(save_kind(VISION, tmp_path / "m"), torch.float32)
    assert model_images(model) is None
    assert row_format(model).kind == "tokens"
    read_images(model)
    assert model_images(model) == ((3, 32, 32), (IMAGE_TOKEN,) * 16)
    inputs = model_inputs(model, calibration_inputs(VISION))
    assert {name: list(value.shape[1:]) for name, value in inputs.items()} == {
        "input_ids": [32],
        "pixel_values": [3, 32, 32],
    }
    assert not model_task(model).generates  # rows cannot be sampled, nor cut between the tokens of an image


def test_what_stands_around_an_image_is_the_models_own(tmp_path: Path) -> None:
    model = build_skeleton(save_kind(kind_named("gemma3-images"), tmp_path / "m"), torch.float32)
    read_images(model)
    assert row_format(model).image == (121, 120, 120, 120, 120, 122)


def test_models_that_are_not_fed_so_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM is no language model that reads images; drop"):
        read_images(build_skeleton(tiny_llama(tmp_path / "llama"), torch.float32))
    grids = build_skeleton(save_kind(kind_named("qwen2-vl"), tmp_path / "qwen"), torch.float32)
    with pytest.raises(UsageError, match="Qwen2VLForConditionalGeneration takes images of any size"):
        read_images(grids)
