"""Images as a model takes them, through the model's own processor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.data.media import MediaKind, MediaRecord, read_media
from hawqtool.errors import InputError, one_line
from hawqtool.parsing import load_json

IMAGE = MediaKind("image", "image", (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"))


def image_row(processor: Any, record: MediaRecord) -> Tensor:
    """One image as the model takes it, ``[channels, height, width]`` float32.

    Args:
        processor: The model's image processor.
        record: The image.

    Raises:
        InputError: If it cannot be read.
    """
    from PIL import Image

    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with Image.open(content) as image:
            found = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise InputError(f"{record.place} cannot be read as an image ({one_line(error)}); remove it") from error
    return torch.as_tensor(found).float()


def image_rows(processor: Any, source: str | Path, num_rows: int, seed: int) -> Tensor:
    """Images of a source as the model takes them, ``[images, channels, height, width]``; see `read_media`."""
    return read_media(IMAGE, str(source), num_rows, seed, lambda record: image_row(processor, record)).values


def image_processor(folder: Path) -> Any:
    """The checkpoint's image processor.

    Raises:
        InputError: If there is none, or it cannot be built.
    """
    import transformers

    path = folder / "preprocessor_config.json"
    try:
        settings = load_json(path)
        name = settings.get("image_processor_type") or settings["feature_extractor_type"]
        # Old names, and those of a backend that needs torchvision; settings are the same.
        name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        # Not AutoImageProcessor, which demands torchvision even where pillow suffices.
        return getattr(transformers, name).from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} gives no image processor that transformers can build ({reason})") from error
