"""Rows of models that read sounds or images with texts, as a run cuts them from folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.rows import check_calibration, check_sources, evaluation_rows
from tests.support.tiny_zoo import BANDS, FRAMES, kind_named, save_kind
from tests.unit.data.test_images import save_images


def save_sounds(folder: Path, count: int, text: bool) -> Path:
    folder.mkdir()
    for number in range(count):
        samples = np.random.default_rng(number).normal(0, 3000, 12_000).astype(np.int16)
        wavfile.write(folder / f"{number:03}.wav", 16000, samples)
        if text:
            (folder / f"{number:03}.txt").write_text(f"sound {number}")
    return folder


def test_sounds_with_transcripts_and_without(tmp_path: Path) -> None:
    source = save_kind(kind_named("whisper"), tmp_path / "model")
    given, bare = (save_sounds(tmp_path / name, 3, name == "given") for name in ("given", "bare"))
    settings = {"group_size": 32, "device": "cpu", "seq_len": 16, "num_samples": 3, "eval_samples": 2, "bits": 4}
    job = prepare(RunConfig(model=str(source), calibration=(str(bare),), eval_data=str(bare), **settings))
    assert job.row_format.kind == "sounds with tokens"
    check_sources(job)  # samples nothing
    rows = {folder: evaluation_rows(job, str(folder), 2) for folder in (given, bare)}
    assert [found.source for found in rows.values()] == ["given", "bare (2 transcripts sampled)"]
    parts = [job.row_format.split(found.tokens) for found in rows.values()]
    assert torch.equal(parts[0]["input_features"], parts[1]["input_features"])
    assert parts[0]["input_features"].shape == (2, BANDS, FRAMES)
    assert not torch.equal(parts[0]["decoder_input_ids"], parts[1]["decoder_input_ids"])
    assert bool((torch.stack([part["decoder_input_ids"] for part in parts])[..., 0] == 0).all())  # the start token

    path = source / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feature_size": 16}))
    with pytest.raises(InputError, match=f"sounds of 16 x {FRAMES}, the model takes {BANDS} x {FRAMES}"):
        evaluation_rows(job, str(given), 2)
    with pytest.raises(UsageError, match="rows cannot be sampled from this .*; give --calibration a folder of WAV"):
        check_calibration(prepare(RunConfig(model=str(source), **settings)))


def test_images_need_captions(tmp_path: Path) -> None:
    job = prepare(RunConfig(model=str(save_kind(kind_named("clip"), tmp_path / "model")), device="cpu", group_size=32))
    assert job.settings.seq_len == 32  # the model's longest text
    images = save_images(tmp_path / "images", 2)
    with pytest.raises(InputError, match=r"000\.png has no text beside it"):
        evaluation_rows(job, str(images), 2)
    for name in ("000", "001"):
        (images / f"{name}.txt").write_text("a stone")
    assert evaluation_rows(job, str(images), 2).tokens.shape == (2, 32, 1 + 3 * 32 * 32 // 32)
