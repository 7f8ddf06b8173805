"""Rows of images for image classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import InputError, one_line
from hawqtool.parsing import load_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def image_rows(processor: Any, folder: Path, num_rows: int, seed: int) -> Tensor:
    """The first images of a folder and its subfolders by path, as the model takes them.

    Args:
        processor: The model's image processor.
        folder: Folder of image files.
        num_rows: Images that are needed; no more are opened.
        seed: With 0 by path; any other seed shuffles all before taking the first.

    Returns:
        ``[images, channels, height, width]`` float32, fewer than ``num_rows`` where there are no more.

    Raises:
        InputError: If the folder is missing, a file is no image, or the processor leaves images of several shapes.
    """
    from PIL import Image

    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; this model takes images: give a folder of image files")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)}); give a folder of image files")
    if seed:
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        files = [files[index] for index in order]
    rows = []
    for path in files[:num_rows]:
        try:
            with Image.open(path) as image:
                rows.append(processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0].float())
        except Exception as error:  # decoders raise errors of any type on damaged files
            raise InputError(f"{path} cannot be read as an image ({one_line(error)}); remove it") from error
        if rows[-1].shape != rows[0].shape:
            raise InputError(
                f"the image processor makes {_size(rows[0])} of {files[0]} but {_size(rows[-1])} of {path}; expected "
                "one size; give images of one shape, or set size in preprocessor_config.json to a height and a width"
            )
    return torch.stack(rows)


def _size(row: Tensor) -> str:
    return " x ".join(map(str, row.shape))


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
