"""A complete packed folder of a tiny model, rounded to nearest, as the pipeline would leave it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import unit_name
from hawqtool.checkpoint.index import CheckpointIndex, read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.layout import DEFAULT_SHARD_BYTES, Layout, plan_layout
from hawqtool.export.manifest import seal
from hawqtool.export.packed_reader import relative_weight_error
from hawqtool.export.writer import CheckpointWriter, copy_small_files, write_config
from hawqtool.formats import QuantFormat, parse_label
from hawqtool.pipeline.run.files import plan_entry
from hawqtool.records import LayerFormats, LayerMetrics, LinearSpec, RoundedLayer
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import quantized, round_without_inputs
from hawqtool.rounding.method import RoundingMethod, Task

MIX = ("w4g32", "w3g64", "w8ch", "w2g32", "w5g64", "w6ch", "w7g32")
METRICS = LayerMetrics(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def linear_specs(index: CheckpointIndex) -> dict[str, LinearSpec]:
    """Every projection inside the blocks."""
    specs = {}
    for info in index.tensors.values():
        if info.name.endswith("_proj.weight"):
            name = info.name.removesuffix(".weight")
            scale_bytes = info.num_bytes // (info.shape[0] * info.shape[1])
            rows, columns = info.shape
            specs[name] = LinearSpec(name, rows, columns, int(name.split(".")[2]), unit_name(name), scale_bytes)
    return specs


def mixed_formats(specs: Mapping[str, LinearSpec], labels: Sequence[str] = MIX) -> LayerFormats:
    """Formats that cycle over the units."""
    units = list(dict.fromkeys(spec.unit for spec in specs.values()))
    return {name: parse_label(labels[units.index(spec.unit) % len(labels)]) for name, spec in specs.items()}


def round_nearest(name: str, weight: Tensor, quant_format: QuantFormat) -> RoundedLayer:
    """Plain rounding with the peak of each group at the largest code; of floats with searched scales."""
    if quant_format.floats is not None:
        divisor = 64.0 if quant_format.floats.scale == "e4m3" else None
        task = Task(name, weight.float(), quant_format, weight.dtype, divisor=divisor)
        layer = round_without_inputs([task], RoundingMethod("rtn"))[0]
        return replace(layer, input_divisor=256.0 if quant_format.has_input_divisor else None)
    grouped = weight.float().view(len(weight), quant_format.num_groups(weight.shape[1]), -1)
    if not quant_format.symmetric:
        return round_to_range(name, weight, quant_format, grouped)
    scales = (grouped.abs().amax(-1) / max(quant_format.max_code, 1)).to(weight.dtype)
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(quant_format.min_code, quant_format.max_code)
    return RoundedLayer(name, quant_format, codes.to(torch.int8).view_as(weight), scales, METRICS)


def round_to_range(name: str, weight: Tensor, quant_format: QuantFormat, grouped: Tensor) -> RoundedLayer:
    """Plain rounding with each group's range, which includes zero, spread over all codes."""
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scales = ((high - low) / (quant_format.max_code - quant_format.min_code)).to(weight.dtype)
    zeros = (quant_format.min_code - (low / scales.float()).round()).clamp(quant_format.min_code, quant_format.max_code)
    codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(quant_format.min_code, quant_format.max_code).to(torch.int8).view_as(weight)
    return RoundedLayer(name, quant_format, codes, scales, METRICS, zeros.to(torch.int8))


def write_packed(
    source: Path,
    folder: Path,
    formats: LayerFormats | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    split_units: bool = False,
) -> Layout:
    """Write ``folder`` from ``source``; ``split_units`` allows fused members in different formats."""
    index = read_index(source)
    reader, specs = TensorReader(index), linear_specs(index)
    chosen = dict(mixed_formats(specs) if formats is None else formats)
    layout = plan_layout(index, chosen, specs, max_shard_bytes)
    folder.mkdir()
    errors = {}
    with CheckpointWriter(index, layout, folder) as writer:
        # Not in file order: layers arrive in call order.
        for name in sorted(chosen, reverse=True):
            weight = reader.tensor(f"{name}.weight")
            layer = round_nearest(name, weight, chosen[name])
            errors[name] = relative_weight_error(weight, dequantize(*quantized(layer)))
            writer.write_layer(layer)
        writer.copy_rest()
    copy_small_files(source, folder)
    units = {name: name if split_units else specs[name].unit for name in chosen}
    others = sorted({"lm_head", *specs} - set(chosen))
    write_config(source, folder, quantization_config(chosen, units, others, {}))
    write_records(folder, layout, chosen, specs, others, writer.checksums, errors)
    report: Any = {"schema": "hawqtool.report/2"}
    seal(folder, report)
    return layout


def write_records(
    folder: Path,
    layout: Layout,
    formats: LayerFormats,
    specs: Mapping[str, LinearSpec],
    others: Sequence[str],
    checksums: Mapping[str, str],
    errors: Mapping[str, float],
) -> None:
    """``reproduce/plan.json`` and ``reproduce/checksums.json``."""
    layers = [plan_entry(specs[name], fmt) for name, fmt in formats.items()]
    plan = {"layers": layers, "other_linears": list(others), "total_bytes": layout.total_bytes}
    (folder / "reproduce").mkdir()
    (folder / "reproduce/plan.json").write_text(json.dumps(plan))
    (folder / "reproduce/checksums.json").write_text(json.dumps({"tensors": checksums, "weight_error": errors}))
