"""Folders of images as rows, the checks on them, and checkpoints whose processor does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hawqtool.config import RunConfig
from hawqtool.data.images import image_processor, image_rows
from hawqtool.errors import InputError
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.rows import evaluation_rows
from tests.support.tiny_zoo import image_processor as tiny_processor
from tests.support.tiny_zoo import kind_named, save_kind

MODES = ("RGB", "RGBA", "L", "P", "1", "LA")


def save_images(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / f"{number:03}.png")
    return folder


def test_images_come_by_path_or_shuffled_by_seed(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "a", 6)
    (folder / "notes.txt").write_text("no image")
    rows = image_rows(tiny_processor(), folder, 6, 0)
    assert rows.shape == (6, 3, 32, 32)
    assert rows.dtype == torch.float32
    for number, row in enumerate(rows):
        with Image.open(folder / f"{number:03}.png") as image:
            assert torch.equal(row, tiny_processor()(images=image, return_tensors="pt")["pixel_values"][0])
    assert torch.equal(image_rows(tiny_processor(), folder, 2, 0), rows[:2])
    shuffled = image_rows(tiny_processor(), folder, 6, 5)
    assert torch.equal(shuffled, image_rows(tiny_processor(), folder, 6, 5))
    assert not torch.equal(shuffled, rows)
    assert sorted(map(float, shuffled.sum((1, 2, 3)))) == sorted(map(float, rows.sum((1, 2, 3))))
    assert len(image_rows(tiny_processor(), folder, 100, 0)) == 6


# GIF has no mode with an alpha channel.
FORMATS = [(m, s) for m in MODES for s in (".png", ".tif", ".GIF") if not (s == ".GIF" and m in ("RGBA", "LA"))]


@pytest.mark.parametrize(("mode", "suffix"), FORMATS)
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str, suffix: str) -> None:
    Image.new("RGB", (20, 30), (200, 30, 90)).convert(mode).save(tmp_path / f"a{suffix}")
    assert image_rows(tiny_processor(), tmp_path, 1, 0).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = save_images(tmp_path, 1) / "000.png"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(InputError, match=r"000\.png cannot be read as an image") as caught:
        image_rows(tiny_processor(), tmp_path, 1, 0)
    assert "\n" not in str(caught.value)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; this model takes images"):
        image_rows(tiny_processor(), tmp_path / "none", 1, 0)
    with pytest.raises(InputError, match="holds no image"):
        image_rows(tiny_processor(), tmp_path, 1, 0)


def test_a_processor_that_keeps_the_shape_needs_images_of_one_shape(tmp_path: Path) -> None:
    processor = tiny_processor()
    processor.do_resize = False
    folder = save_images(tmp_path, 1)
    Image.new("RGB", (10, 12)).save(folder / "001.png")
    with pytest.raises(InputError, match=r"3 x 40 x 48 of .*000\.png but 3 x 12 x 10 of .*001\.png"):
        image_rows(processor, folder, 2, 0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("image_processor_type", "ViTImageProcessorFast"),
        ("image_processor_type", "ViTFeatureExtractor"),
        ("feature_extractor_type", "ViTFeatureExtractor"),
    ],
)
def test_processors_under_old_names(tmp_path: Path, key: str, name: str) -> None:
    settings: dict[str, Any] = tiny_processor().to_dict()
    del settings["image_processor_type"]
    settings["resample"] = int(settings["resample"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {key: name}))
    rows = image_rows(image_processor(tmp_path), save_images(tmp_path / "images", 1), 1, 0)
    assert torch.equal(rows, image_rows(tiny_processor(), tmp_path / "images", 1, 0))


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"image_processor_type": "NoSuch"}'])
def test_no_processor(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match="preprocessor_config.json gives no image processor"):
        image_processor(tmp_path)


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    source = save_kind(kind_named("vit"), tmp_path / "vit")
    path = source / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 48, "width": 48}}))
    job = prepare(RunConfig(model=str(source), group_size=32, device="cpu"))
    with pytest.raises(InputError, match="images of 3 x 48 x 48, the model takes 3 x 32 x 32"):
        evaluation_rows(job, str(save_images(tmp_path / "images", 3)), 2)
