"""Sounds as a model takes them: WAV files, resampled, through the model's own feature extractor."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqtool.data.media import MediaKind, MediaRecord
from hawqtool.errors import InputError, one_line

SOUND = MediaKind("sound", "audio", (".wav", ".wave"))

SECONDS = 10
"""Length of a row where the model takes sounds of any length."""

_FRAME = 80
"""Samples of the longest frame into which a model cuts samples without filling up the last."""


def feature_extractor(folder: Path) -> Any:
    """The checkpoint's feature extractor.

    Raises:
        InputError: If there is none, or it cannot be built.
    """
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # settings are data of others: errors are of any type
        raise InputError(
            f"{folder} has no feature extractor of sounds that transformers can build ({one_line(error)}); expected "
            "preprocessor_config.json beside config.json"
        ) from error


def sound_row(extractor: Any, argument: str, record: MediaRecord, positions: int = 1) -> Tensor:
    """One sound as the model takes it, float32.

    Extractors of a fixed window, such as Whisper's 30 seconds, fill it up with silence as they do in use. For others a
    row has ten seconds: shorter sounds are repeated, so that all rows have one length.

    Args:
        extractor: The model's feature extractor.
        argument: What it gives and the model takes: ``input_values`` or ``input_features``.
        record: The sound.
        positions: Tokens beside it; the samples of a row are a multiple of them.

    Raises:
        InputError: If it is no WAV file, empty, or the extractor fails on it or gives what is no number.
    """
    rate = int(extractor.sampling_rate)
    samples = read_wav(record, rate)
    fixed = getattr(extractor, "n_samples", None) or getattr(extractor, "max_length", None)
    if not fixed:
        whole = math.lcm(positions, _FRAME)
        length = max(1, SECONDS * rate // whole) * whole
        samples = np.resize(samples, length)  # repeats what is shorter
    else:
        samples = samples[: int(getattr(extractor, "n_samples", None) or SECONDS * rate)]
    try:
        found = extractor(samples, sampling_rate=rate, return_tensors="pt")[argument][0]
    except Exception as error:  # as above
        raise InputError(f"{record.place}: the feature extractor fails on it ({one_line(error)})") from error
    row = torch.as_tensor(found).float()
    if not bool(row.isfinite().all()):
        raise InputError(
            f"{record.place}: the feature extractor gives NaN or Inf for it, expected finite values; check "
            "preprocessor_config.json, or leave the sound out"
        )
    return row


def read_wav(record: MediaRecord, rate: int) -> NDArray[np.float32]:
    """Samples of a WAV file in -1 to 1, its channels' mean, at so many a second.

    Raises:
        InputError: If it cannot be read or holds no sample.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with warnings.catch_warnings(action="ignore", category=wavfile.WavFileWarning):  # chunks that hold no samples
            given, data = wavfile.read(content)
    except Exception as error:  # damaged files raise errors of any type
        raise InputError(
            f"{record.place} cannot be read as a WAV file ({one_line(error)}); convert it to PCM, or remove it"
        ) from error
    if not data.size or given <= 0:
        raise InputError(f"{record.place} holds no sound ({data.size} samples, {given} a second); remove it")
    if data.dtype == np.uint8:
        samples = data.astype(np.float64) / 128 - 1
    elif np.issubdtype(data.dtype, np.integer):
        samples = data.astype(np.float64) / (1 << (8 * data.dtype.itemsize - 1))
    else:
        samples = data.astype(np.float64)
    if samples.ndim > 1:
        samples = samples.mean(1)
    if given != rate:
        common = math.gcd(given, rate)
        samples = resample_poly(samples, rate // common, given // common)
    if not np.isfinite(samples).all():
        raise InputError(f"{record.place} holds samples that are NaN or infinite; remove it")
    return samples.astype(np.float32)
