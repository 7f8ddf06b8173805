"""What models read of a row, by their configurations, and the arguments that rows become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hawqtool.model.inputs.arguments import first_decoder_token, image_shape, model_inputs, row_format, row_positions
from hawqtool.model.inputs.row_format import RowFormat
from tests.support.tiny_zoo import BANDS, FRAMES, IMAGE_SIZE, kind_named

_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def built(config: Any, model: str) -> Any:
    with torch.device("meta"):
        return getattr(transformers, model)(config)


def kind_model(name: str) -> Any:
    kind = kind_named(name)
    return built(getattr(transformers, kind.config)(**kind.settings), kind.model)


def test_the_shape_of_images_is_that_of_the_vision_part() -> None:
    vision = transformers.CLIPVisionConfig(image_size=32)
    assert image_shape(transformers.CLIPConfig(vision_config=vision.to_dict())) == (3, (32, 32))
    assert image_shape(transformers.ViTConfig(image_size=[32, 48], num_channels=1)) == (1, (32, 48))
    assert image_shape(transformers.SegformerConfig()) == (3, None)


FORMATS = {
    "bert": RowFormat("input_ids"),
    "t5": RowFormat("input_ids"),
    "vit": RowFormat(None, "pixel_values", (3, IMAGE_SIZE, IMAGE_SIZE)),
    "wav2vec2": RowFormat(None, "input_values", (-1,)),
    "whisper": RowFormat("decoder_input_ids", "input_features", (BANDS, FRAMES)),
    "clip": RowFormat("input_ids", "pixel_values", (3, IMAGE_SIZE, IMAGE_SIZE)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_by_kind(name: str) -> None:
    assert row_format(kind_model(name)) == FORMATS[name]


def test_spectra_have_the_bands_that_the_config_says() -> None:
    classifier = transformers.ASTConfig(**_SMALL, max_length=64, num_mel_bins=16, patch_size=8)
    assert row_format(built(classifier, "ASTForAudioClassification")).shape == (64, 16)
    speech = transformers.Speech2TextConfig(d_model=8, encoder_layers=1, decoder_layers=1, input_feat_per_channel=16)
    found = row_format(built(speech, "Speech2TextForConditionalGeneration"))
    assert found == RowFormat("decoder_input_ids", "input_features", (-1, 16))
    # A classifier by Whisper's encoder has no decoder, whatever its config says.
    whisper = transformers.WhisperConfig(**kind_named("whisper").settings)
    assert row_format(built(whisper, "WhisperForAudioClassification")).tokens is None


def test_positions_are_those_of_the_larger_part() -> None:
    assert [row_positions(kind_model(name), 40) for name in ("bert", "vit", "clip", "whisper")] == [40, 1, 40, 50]
    assert row_positions(kind_model("wav2vec2"), 40) == 500


def test_a_decoder_of_texts_gets_them_one_place_later_and_one_of_sounds_its_own() -> None:
    rows = torch.tensor([[5, 6, 7]])
    inputs = model_inputs(kind_model("t5"), rows)
    assert inputs["input_ids"] is rows
    assert inputs["decoder_input_ids"].tolist() == [[0, 5, 6]]
    model = kind_model("whisper")
    sound = torch.randn(1, BANDS, FRAMES)
    inputs = model_inputs(model, row_format(model).join(rows, sound))
    assert inputs["decoder_input_ids"].tolist() == rows.tolist()
    assert torch.equal(inputs["input_features"], sound)
    assert first_decoder_token(model.config) == 0
