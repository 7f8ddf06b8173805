"""What the pipeline does with one tiny model of every architecture; run as a module, it prints the table."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.errors import HawqError
from hawqtool.model.skeleton import build_skeleton
from hawqtool.model.vision import read_images
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan, Rows
from tests.support.replay64 import excesses, load, put_in_place, read_packed, replay, run, silence_loaders
from tests.support.runs import completed
from tests.support.tiny_zoo import SUPPORTED, Kind, calibration_inputs, save_kind

WIDTHS = (3, 4, 2, 8)
GROUP_SIZE = 32
STORED = torch.bfloat16


@dataclass(frozen=True)
class Examined:
    """What came out for one kind.

    Args:
        source: Folder of the original.
        folder: Folder written by the pipeline.
        units: Number of allocation units.
        shares: Share of codes equal to the free float64 replay, by weight; empty where there was none.
        excess: Largest distance of a code from its own target beyond half a step (see `excesses`), by weight.
        seconds: Time of saving, rounding and replay.
    """

    source: Path
    folder: Path
    units: int
    shares: dict[str, float]
    excess: dict[str, float]
    seconds: float


def prepare_kind(kind: Kind, source: Path, target_shift: str | None = "off") -> Job:
    """A job that computes in float64, all rows in one batch, so that float noise does not hide errors."""
    settings = {"profile": "auto" if kind.loads else "vllm", "group_size": GROUP_SIZE, "batch_size": kind.rows}
    settings["quantize_vision"] = kind.task == "vision"
    job = prepare(RunConfig(model=str(source), device="cpu", target_shift=target_shift, **settings))
    skeleton = build_skeleton(source, torch.float64, vllm=not kind.loads)
    if kind.task == "vision":
        read_images(skeleton)
    return replace(job, dtype=torch.float64, skeleton=skeleton)


def mixed_plan(job: Job) -> BitPlan:
    """Widths in turn over the units."""
    by_width = {width: uniform_formats(job.units, width, GROUP_SIZE) for width in WIDTHS}
    formats = {u.name: by_width[WIDTHS[i % len(WIDTHS)]][u.name] for i, u in enumerate(job.units)}
    return BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))


def examine(kind: Kind, place: Path, free: bool = True) -> Examined:
    """Save a model of a kind, round it through the pipeline, and replay the rounding slowly.

    Args:
        kind: The kind.
        place: Existing folder.
        free: Whether to replay it freely too, code after code of its own, beside judging every code alone.
    """
    start = time.perf_counter()
    source, folder = save_kind(kind, place / "source", STORED), place / "rounded"
    inputs = calibration_inputs(kind)
    job = prepare_kind(kind, source)
    round_to_folder(RunContext(job), mixed_plan(job), Rows(inputs, "test", "-"), folder, "test")
    completed(folder, source)
    packed = read_packed(folder)
    formats, scales = ({n: getattr(p, field) for n, p in packed.items()} for field in ("quant_format", "scales"))
    expected = replay(kind, source, inputs, formats, STORED, scales) if free else {}
    shares = {n: float((packed[n].codes == layer.codes).float().mean()) for n, layer in expected.items()}
    excess = excesses(kind, source, inputs, packed)
    return Examined(source, folder, len(job.units), shares, excess, time.perf_counter() - start)


def loaded_difference(kind: Kind, examined: Examined) -> float:
    """Largest difference between the written folder as a user loads it and the original with its weights replaced.

    Both are loaded as stored, hence unpacked in the stored dtype, and then compute in float32. (Told another dtype,
    transformers keeps the stored one for tensors of a packed checkpoint whose names it changes: dtypes would mix.)
    """
    original, restored = (load(kind, folder, "auto") for folder in (examined.source, examined.folder))
    put_in_place(kind, original, read_packed(examined.folder))
    inputs = calibration_inputs(kind)
    with torch.autocast("cpu"):  # DeepSeek V4 computes in no single dtype but float32
        run(kind, restored, inputs)  # a packed model unpacks itself in its first call
    # The method of nn.Module, because that of transformers refuses packed models.
    outputs = [run(kind, nn.Module.float(model), inputs) for model in (original, restored)]
    return float((outputs[0] - outputs[1]).abs().max())


def main(names: list[str]) -> None:
    """Print the table for the kinds named, or for all."""
    silence_loaders()
    columns = ("kind", "linears", "units", "min equal", "mean equal", "max excess", "max diff", "seconds")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for kind in SUPPORTED:
        if names and kind.name not in names:
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                result = examine(kind, Path(place))
                difference = f"{loaded_difference(kind, result):.2g}" if kind.loads else "not loadable"
            except HawqError as error:
                print(f"| {kind.name} | {type(error).__name__}: {error} |", flush=True)
                continue
            shares = list(result.shares.values())
            cells = [kind.name, str(len(shares)), str(result.units), f"{min(shares):.5f}"]
            cells += [f"{sum(shares) / len(shares):.6f}", f"{max(result.excess.values()):.1e}"]
            print("| " + " | ".join([*cells, difference, f"{result.seconds:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
