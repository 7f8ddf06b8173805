"""Folders that hold a configuration alone, which engines can fill with random weights: for speed."""

from __future__ import annotations

import json
from pathlib import Path

from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.formats import parse_label
from hawqtool.formats.cache import cache_scheme
from speed.shapes import SHAPES

_LINEARS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def write_configuration(shape: str, label: str, folder: Path) -> Path:
    """Write config.json of a shape with every linear in a format, and return the folder.

    Args:
        shape: Name of a shape of benchmark.py.
        label: Label of a format, ``16`` for none; behind ``+`` that of the KV cache: ``fp8-a8f+fp8``. ``A/B`` is A in
            attention and B in the rest; ``A/B/C/D`` is one for each of query to value, output, gate and up, down.
        folder: Folder to create.
    """
    folder.mkdir(parents=True)
    content = SHAPES[shape].config()
    weights, _, cache = label.partition("+")
    if weights != "16":
        named = weights.split("/")
        # One format serves all, two are attention's and the rest's.
        dealt = {1: named * 4, 2: [named[0], named[0], named[-1], named[-1]], 4: named}[len(named)]
        formats, units = {}, {}
        for block in range(SHAPES[shape].blocks):
            for (unit, members), format_label in zip(_LINEARS.items(), dealt, strict=True):
                chosen = parse_label(format_label)
                for member in (f"model.layers.{block}.{name}" for name in members):
                    formats[member], units[member] = chosen, f"model.layers.{block}.{unit}"
        found = quantization_config(formats, units, ["lm_head"], {})
        found["kv_cache_scheme"] = cache_scheme(cache) if cache else None
        content["quantization_config"] = found
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
