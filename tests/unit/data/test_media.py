"""Images and sounds with their texts, from folders and from a dataset that is not decoded."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import Tensor

from hawqtool.data.media import MediaRecord, read_media
from hawqtool.data.sounds import SOUND, read_wav
from hawqtool.errors import InputError


def wav(number: int) -> bytes:
    content = io.BytesIO()
    wavfile.write(content, 16000, np.full(10, number, np.int16))
    return content.getvalue()


def samples(record: MediaRecord) -> Tensor:
    return torch.from_numpy(read_wav(record, 16000)) * 32768


def test_files_come_by_path_with_the_texts_beside_them(tmp_path: Path) -> None:
    for number, name in enumerate(("b/2.wav", "a/1.WAV", "c.wav")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wav(number))
    (tmp_path / "a/1.txt").write_text("\ufeffone", encoding="utf-8")
    found = read_media(SOUND, str(tmp_path), 5, 0, samples)
    assert found.label == tmp_path.name
    assert found.values[:, 0].tolist() == [1, 0, 2]
    assert found.texts == ("one", None, None)
    assert [Path(place).name for place in found.places] == ["1.WAV", "2.wav", "c.wav"]
    assert len(read_media(SOUND, str(tmp_path), 2, 0, samples).values) == 2
    shuffled = read_media(SOUND, str(tmp_path), 3, 3, samples).values[:, 0].tolist()
    assert sorted(shuffled) == [0, 1, 2] and shuffled != [1, 0, 2]


def test_a_dataset_gives_the_bytes_of_its_files(tmp_path: Path) -> None:
    rows = {"audio": [{"bytes": wav(n), "path": None} for n in range(4)], "sentence": [f"number {n}" for n in range(4)]}
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    table.to_parquet(tmp_path / "train.parquet")
    found = read_media(SOUND, str(tmp_path), 3, 0, samples)
    assert found.values[:, 0].tolist() == [0, 1, 2]
    assert found.texts == ("number 0", "number 1", "number 2")
    shuffled = read_media(SOUND, str(tmp_path), 4, 1, samples)
    assert [f"number {int(value)}" for value in shuffled.values[:, 0]] == list(shuffled.texts)
    datasets.Dataset.from_dict({"sound": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="found the columns sound; expected audio with the bytes of a file"):
        read_media(SOUND, str(tmp_path), 1, 0, samples)


def test_what_holds_none(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(InputError, match=r"holds no sound \(\.wav"):
        read_media(SOUND, str(tmp_path), 1, 0, samples)
    with pytest.raises(InputError, match="is not a folder; this model takes sounds"):
        read_media(SOUND, str(tmp_path / "a.flac"), 1, 0, samples)
    (tmp_path / "b.wav").write_bytes(wav(1))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"b\.txt cannot be read as UTF-8 text"):
        read_media(SOUND, str(tmp_path), 1, 0, samples)
