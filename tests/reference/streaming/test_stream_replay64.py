"""The oracle itself: it names every weight as the checkpoint does, and judges its own codes right, others wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hawqtool.formats import QuantFormat
from tests.support.replay64 import excesses, live_weights, load, replay, silence_loaders
from tests.support.tiny_zoo import SUPPORTED, Kind, calibration_inputs, save_kind

GROUP_SIZE = 32


def block_weights(kind: Kind, folder: Path) -> list[str]:
    views = live_weights(kind, load(kind, folder, torch.float32))
    return [name for name, view in views.items() if re.search(r"\.\d+\.", name) and len(view) > 1]


# Wrappers have other names live than on disk, and towers beside their blocks, and some experts lie stacked in the file;
# their codes are compared as the others'.
PLAIN = [kind for kind in SUPPORTED if kind.task != "multimodal" and not kind.stacked]


@pytest.mark.parametrize("kind", PLAIN, ids=[kind.name for kind in PLAIN])
def test_live_weights_are_those_of_the_checkpoint(kind: Kind, tmp_path: Path) -> None:
    silence_loaders()
    views = live_weights(kind, load(kind, save_kind(kind, tmp_path, torch.float32), torch.float32))
    stored = load_file(tmp_path / "model.safetensors")
    names = block_weights(kind, tmp_path)
    for name in names:
        on_disk = stored[f"{name}.weight"]
        assert torch.equal(views[name], on_disk if views[name].is_contiguous() else on_disk.t()), name
    # Matrices that are no linears of blocks: routers, gains of two dimensions, position biases, lists of projections,
    # what mixes the streams.
    others = {n for n, t in stored.items() if t.ndim == 2 and re.search(r"\.\d+\.", n)} - {f"{n}.weight" for n in names}
    known = re.compile(
        r"((gate|[qk]_norm|relative_attention_bias|altup_\w+\.\d)\.weight|position_bias_table|ape|hc_\w+_fn)$"
    )
    assert all(known.search(name) for name in others), others


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral", "falcon-old", "opt-post", "vit"])
def test_the_replay_finds_its_own_codes_right_and_a_changed_one_wrong(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in SUPPORTED if kind.name == name)
    source, inputs = save_kind(kind, tmp_path), calibration_inputs(kind)
    formats = {layer: QuantFormat(3, GROUP_SIZE) for layer in block_weights(kind, source)}
    rounded = replay(kind, source, inputs, formats, torch.bfloat16)
    assert max(excesses(kind, source, inputs, rounded).values()) < 1e-9
    first = next(iter(rounded))
    codes = rounded[first].codes.clone()
    codes[0, 0] = -4 if codes[0, 0] >= 0 else 3
    wrong = excesses(kind, source, inputs, rounded | {first: replace(rounded[first], codes=codes)})
    assert wrong[first] > 0.1
