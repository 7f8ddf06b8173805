"""WAV files of every kind as samples, and as rows of one length."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import transformers
from scipy.io import wavfile

from hawqtool.data.media import MediaRecord
from hawqtool.data.sounds import feature_extractor, read_wav, sound_row
from hawqtool.errors import InputError
from tests.support.tiny_zoo import BANDS, FRAMES, kind_named, sound_extractor

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
STORED = {
    "uint8": (np.round(TONE * 128 + 128).astype(np.uint8), 1 / 128),
    "int16": (np.round(TONE * 32768).astype(np.int16), 1 / 32768),
    "int32": (np.round(TONE * 2**31).astype(np.int32), 1e-7),
    "float32": (TONE.astype(np.float32), 1e-7),
    "stereo": (np.stack([TONE * 1.5, TONE * 0.5], 1).astype(np.float32), 1e-6),
}


def record(data: np.ndarray, rate: int = 8000) -> MediaRecord:
    content = io.BytesIO()
    wavfile.write(content, rate, data)
    return MediaRecord("a.wav", content.getvalue(), None)


@pytest.mark.parametrize("kind", STORED)
def test_samples_of_every_kind_are_the_sound(kind: str) -> None:
    data, tolerance = STORED[kind]
    found = read_wav(record(data), 8000)
    assert found.dtype == np.float32
    assert np.abs(found - TONE).max() <= tolerance


@pytest.mark.parametrize("rate", [16000, 11025])
def test_another_rate_is_the_same_tone(rate: int) -> None:
    found = read_wav(record(TONE.astype(np.float32)), rate)
    assert len(found) == rate
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    inside = slice(rate // 10, -rate // 10)  # away from where the tone begins and ends at once
    assert np.abs(found - expected)[inside].max() < 2e-3


@pytest.mark.parametrize("content", [b"", b"hello", b"RIFF\x24\x00\x00\x00WAVE"])
def test_what_is_no_wav_file_is_named(content: bytes) -> None:
    with pytest.raises(InputError, match="a.wav cannot be read as a WAV file") as caught:
        read_wav(MediaRecord("a.wav", content, None), 16000)
    assert "\n" not in str(caught.value)


def test_no_sound_and_no_numbers() -> None:
    with pytest.raises(InputError, match="holds no sound"):
        read_wav(record(np.zeros(0, np.int16)), 16000)
    with pytest.raises(InputError, match="NaN or infinite"):
        read_wav(record(np.full(10, np.nan, np.float32)), 8000)


def test_short_sounds_are_repeated_and_long_ones_cut_to_one_length() -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    short, long = (np.random.default_rng(0).normal(0, 0.1, n).astype(np.float32) for n in (50_000, 400_000))
    found = sound_row(extractor, "input_values", record(short, 16000), positions=48)
    assert found.shape == (666 * 240,)  # the most in ten seconds that 48 positions and frames of 80 divide
    assert np.array_equal(found[:50_000].numpy(), short) and np.array_equal(found[50_000:100_000].numpy(), short)
    cut = sound_row(extractor, "input_values", record(long, 16000), positions=48)
    assert np.array_equal(cut.numpy(), long[: 666 * 240])


def test_a_window_of_the_models_own_is_filled_with_silence(tmp_path: Path) -> None:
    sound_extractor(kind_named("whisper")).save_pretrained(tmp_path)
    extractor, sound = feature_extractor(tmp_path), np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    found = sound_row(extractor, "input_features", record(sound, 16000))
    assert found.shape == (BANDS, FRAMES)
    padded = np.pad(sound, (0, 12_000))
    expected = extractor(padded, sampling_rate=16000, return_tensors="np")["input_features"][0]
    assert np.array_equal(found.numpy(), expected)


def test_a_checkpoint_without_an_extractor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no feature extractor of sounds") as caught:
        feature_extractor(tmp_path)
    assert "\n" not in str(caught.value)


def test_features_that_are_no_numbers_name_the_sound() -> None:
    class Dividing:
        sampling_rate = 8000

        def __call__(self, samples: np.ndarray, **_: object) -> dict[str, list[np.ndarray]]:
            with np.errstate(divide="ignore", invalid="ignore"):
                return {"input_features": [samples[None] / np.zeros(1, np.float32)]}

    with pytest.raises(InputError, match=r"a\.wav: the feature extractor gives NaN or Inf"):
        sound_row(Dividing(), "input_features", record(TONE.astype(np.float32)))
