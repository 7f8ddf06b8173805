"""Files beside the weights that belong to a checkpoint: tokenizer, templates, code, modules of a sentence encoder."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from hawqtool.errors import InputError
from hawqtool.parsing import ParseError, load_json, short

WEIGHT_PATTERNS = (
    "*.safetensors*",
    "*.index.json",
    "*.bin",
    "*.pth",
    "*.pt",
    "*.ckpt*",
    "*.pkl",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.h5",
    "*.msgpack",
    "*.npz",
    "*.ot",
    "*.tflite",
    "consolidated*",
)
"""Weights in any form: the packed files replace them."""

OWN_FILES = ("config.json", "readme.md", "report.json", "report.html")
"""Files that the pipeline writes itself."""

QUANTIZATION_FILES = ("hf_quant_config.json",)
"""How the source is quantized, which the output is not: engines would believe it."""

ADAPTER_FILES = ("adapter_*",)
"""Loaders would take the output for a base model with this adapter, which was not part of the weights."""

TEMPLATE_FOLDER = "additional_chat_templates"
MODULES_FILE = "modules.json"
"""Names the folders of a sentence encoder's further modules, such as 1_Pooling."""


def companion_folders(folder: Path) -> tuple[str, ...]:
    """Folders that belong to a checkpoint: named chat templates, and the modules of a sentence encoder.

    Raises:
        InputError: If modules.json cannot be used, or names a folder outside the checkpoint.
    """
    names = [TEMPLATE_FOLDER] if (folder / TEMPLATE_FOLDER).is_dir() else []
    if (folder / MODULES_FILE).is_file():
        names += [name for name in _module_folders(folder / MODULES_FILE) if (folder / name).is_dir()]
    return tuple(dict.fromkeys(names))


def companion_files(folder: Path) -> tuple[str, ...]:
    """Paths, relative to a checkpoint's folder, of what is copied with it, sorted.

    On top never weights, adapters, hidden files or what is written anew; of `companion_folders` all that is not
    hidden, for a module's own weights are part of it.

    Raises:
        InputError: As `companion_folders`.
    """
    found = [path.name for path in folder.iterdir() if path.is_file() and _is_companion(path.name.lower())]
    for name in companion_folders(folder):
        inside = (path.relative_to(folder) for path in (folder / name).rglob("*") if path.is_file())
        found += [str(path) for path in inside if not any(part.startswith(".") for part in path.parts)]
    return tuple(sorted(found))


def left_folders(folder: Path) -> tuple[str, ...]:
    """Folders beside the weights that are not copied, sorted; hidden ones are not listed."""
    copied = {Path(name).parts[0] for name in companion_folders(folder)}
    there = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return tuple(sorted(set(there) - copied))


def _is_companion(name: str) -> bool:
    left_out = (*WEIGHT_PATTERNS, *ADAPTER_FILES, *QUANTIZATION_FILES)
    return not name.startswith(".") and name not in OWN_FILES and not any(fnmatch(name, p) for p in left_out)


def _module_folders(path: Path) -> Iterator[str]:
    try:
        modules = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{path} is not a list of modules; expected one object each with its path; download it again")
    for module in modules:
        name = module.get("path")
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise InputError(
                f"{path} names the module {short(repr(name))}; expected a folder inside the checkpoint; correct it"
            )
        if Path(name).parts:  # the transformer itself may lie on top
            yield name
