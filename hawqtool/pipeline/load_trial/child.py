"""Child process of a load trial: transformers loads a folder and makes one forward pass.

``python -m hawqtool.pipeline.load_trial.child CLASS DEVICE`` imports what that class needs and wakes the device, then
reads the arguments of `main` as a JSON list from stdin; nothing there, nothing done. A failure ends in a traceback,
whose last line says why.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from hawqtool.export.verify import verify_folder
from hawqtool.model.inputs.arguments import model_inputs
from hawqtool.model.tasks import IMAGES_READ, row_outputs
from hawqtool.parsing import load_json
from hawqtool.runtime.lifeline import watch_parent

ROWS, OUTPUTS, PROBLEMS = "rows.safetensors", "outputs.safetensors", "problems.json"
"""Files of the rows, of what the model gives on them, and of what verification found."""

_LOADER = "transformers.quantizers.quantizer_compressed_tensors"
_PACKAGE = "compressed_tensors.compressors"


def get_ready(class_name: str, device: str) -> None:
    """Import what loading a model will need, and make a GPU's context: all that takes no folder.

    Args:
        class_name: Class of the model.
        device: Where it will compute, most likely.
    """
    for name in (_LOADER, _PACKAGE):
        import_module(name)
    _class(class_name)
    if device != "cpu":
        few = torch.ones((8, 8), dtype=torch.bfloat16, device=device)
        float((few @ few).sum())  # loads the libraries of products too


def _class(name: str) -> Any:
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def main(folder: str, class_name: str, trust: str, place: str, images: str, original: str, device: str) -> None:
    """Write what a model gives on some rows to a file; and verify its folder beside, where asked to.

    Args:
        folder: Holds the model.
        class_name: Its class.
        trust: 1 where its own code may run.
        place: Folder with the file of the rows, for those that are written.
        images: What `model_images` gives of the original, as JSON.
        original: Folder of the original, to verify the folder against it; empty for no verification.
        device: Where it computes.
    """
    verification = Thread(target=_verify, args=(folder, original, device, place))
    if original:
        verification.start()
    model = _class(class_name).from_pretrained(folder, dtype="auto", trust_remote_code=trust == "1").eval()
    # Codes are unpacked by the first pass, where they lie.
    model, rows = torch.nn.Module.to(model, device), load_file(Path(place) / ROWS)["rows"].to(device)
    if images != "null":
        setattr(model, IMAGES_READ, tuple(map(tuple, json.loads(images))))
    if _rounds_activations(folder):
        _pass(model, rows)  # which unpacks the weights in their own dtype
        # In 16 bits they differ by as much as that, and so does what they are rounded to: by whole steps.
        model = torch.nn.Module.float(model)
    save_file({"outputs": _pass(model, rows).float().cpu().contiguous()}, Path(place) / OUTPUTS)
    if original:
        verification.join()


def _verify(folder: str, original: str, device: str, place: str) -> None:
    """Write what `verify_folder` finds, as a JSON list; where it fails there is no such file."""
    problems = verify_folder(Path(folder), Path(original), device, sealed=False).problems
    (Path(place) / PROBLEMS).write_text(json.dumps(problems), encoding="utf-8")


def _pass(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of one forward pass in the dtype of the model."""
    dtype, device = next(model.parameters()).dtype, rows.device
    inputs = {n: v.to(device, dtype if v.is_floating_point() else None) for n, v in model_inputs(model, rows).items()}
    with torch.no_grad():
        return row_outputs(model, model(**inputs))


def _rounds_activations(folder: str) -> bool:
    """Whether inputs of some layers of a folder are rounded, or keys and values."""
    config = load_json(Path(folder) / "config.json")["quantization_config"]
    inputs = any(group["input_activations"] for group in config["config_groups"].values())
    return inputs or config.get("kv_cache_scheme") is not None


if __name__ == "__main__":
    watch_parent(lambda: os._exit(1))
    get_ready(*sys.argv[1:])
    if order := sys.stdin.read():
        main(*json.loads(order))
    os._exit(0)  # taking down all modules takes most of a second
