"""Rows of sounds and images with the tokens beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile
from torch import Tensor

from hawqtool.data.media_rows import MediaReader, RowTexts, Transcribe
from hawqtool.data.tokenizer import encode, load_tokenizer
from hawqtool.errors import InputError
from hawqtool.model.inputs.row_format import RowFormat
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_zoo import image_processor
from tests.unit.data.test_images import save_images

SPEECH = RowFormat("decoder_input_ids", "input_values", (-1,))
START = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    for name in ("a", "b"):
        wavfile.write(tmp_path / f"{name}.wav", 16000, np.arange(1, 101, dtype=np.int16))
    (tmp_path / "a.txt").write_text("the sea\n")
    return tmp_path


def reader(
    folder: Path, positions: int, transcribe: Transcribe | None = None, start: int | None = START
) -> MediaReader:
    return MediaReader(SPEECH, folder, RowTexts(load_tokenizer(folder, False), positions, start, transcribe))


def test_texts_are_repeated_or_cut_and_missing_ones_sampled(folder: Path) -> None:
    given: list[tuple[tuple[int, ...], list[int], int]] = []

    def transcribe(sounds: Tensor, before: list[int], positions: int) -> Tensor:
        given.append((tuple(sounds.shape), before, positions))
        return torch.full((len(sounds), positions), 7)

    body = encode(load_tokenizer(folder, False), "the sea", special_tokens=False)
    label, values, tokens = reader(folder, 20, transcribe).read(str(folder), 2, 0)
    assert tokens is not None
    assert label == f"{folder.name} (1 transcripts sampled)"
    assert tokens.tolist() == [[START, *(body * 20)[:19]], [7] * 20]
    assert given == [((1, values.shape[1]), [START], 20)]
    assert values.shape[1] % 20 == 0
    _, _, short = reader(folder, 3, transcribe).read(str(folder), 1, 0)
    assert short is not None and short.tolist() == [[START, *body[:2]]]


def test_texts_that_are_missing_empty_or_without_room(folder: Path) -> None:
    with pytest.raises(InputError, match=r"b\.wav has no text beside it; expected one"):
        reader(folder, 8).read(str(folder), 2, 0)
    with pytest.raises(InputError, match="no room beside special tokens; raise --seq-len"):
        reader(folder, 1).read(str(folder), 1, 0)
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"the text of .*a\.wav is empty"):
        reader(folder, 8).read(str(folder), 1, 0)


def test_captions_stand_between_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    images = save_images(tmp_path / "images", 1)
    (images / "000.txt").write_text("a stone")
    form = RowFormat("input_ids", "pixel_values", (3, 32, 32))
    tokenizer = load_tokenizer(tmp_path, False)
    _, values, tokens = MediaReader(form, tmp_path, RowTexts(tokenizer, 16, None, None)).read(str(images), 1, 0)
    assert values.shape == (1, 3, 32, 32) and tokens is not None
    whole = encode(tokenizer, "a stone" * 9, special_tokens=False)
    assert set(tokens[0].tolist()) <= set(encode(tokenizer, "a stone", special_tokens=True)) | set(whole)
    assert tokens.shape == (1, 16)
