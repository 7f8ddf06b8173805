"""Other tools beside hawqtool on the same rows: their command is run, and what it wrote is read as a model."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError, UsageError
from hawqtool.export.packed_reader import PackedReader, read_config
from hawqtool.streaming.stream import WeightSource

_PLACES = ("{model}", "{rows}", "{out}")


class StateDict:
    """Weights from a file that ``torch.save`` made of a state dict."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """Tensor of that name."""
        return self._tensors[name]


def run_tool(command: str, model: Path, tokens: Tensor, scratch: Path) -> tuple[WeightSource, float]:
    """Have a tool quantize the model.

    Args:
        command: With ``{model}``, its folder; ``{rows}``, a file by ``torch.save`` of the calibration rows; and
            ``{out}``, where to write: a folder as transformers loads it, dense or packed, or, with ``.pt`` behind that
            name, a state dict of dense weights.
        model: Folder of the original.
        tokens: Calibration rows, ``[rows, seq_len]`` int64.
        scratch: Existing folder to work in.

    Returns:
        The weights, and seconds: those of ``seconds`` in a JSON object on the last line that the tool prints, or all
        that it took.

    Raises:
        UsageError: If the command does not say where to write, or fails.
        InputError: If it wrote no model.
    """
    if "{out}" not in command:
        raise UsageError(f"tool: {command} has no {{out}}; expected a command with {', '.join(_PLACES)}")
    rows, out = scratch / "rows.pt", scratch / "out"
    torch.save(tokens.cpu(), rows)
    places = dict(zip(_PLACES, map(str, (model, rows, out)), strict=True))
    parts = [_filled(part, places) for part in shlex.split(command)]
    start = time.perf_counter()
    try:
        done = subprocess.run(parts, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"tool: {parts[0]} cannot be run ({error.strerror}); install it, or name its path") from error
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UsageError(f"tool: {command} failed with code {done.returncode}: {last}")
    return _weights(out), _told(done.stdout).get("seconds", seconds)


def _filled(part: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        part = part.replace(name, value)
    return part


def _told(output: str) -> dict[str, Any]:
    """The JSON object on the last line; empty where there is none."""
    try:
        found = json.loads((output.strip().splitlines() or [""])[-1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _weights(out: Path) -> WeightSource:
    state = out.with_name(f"{out.name}.pt")
    if state.is_file():
        return StateDict(state)
    if not out.is_dir():
        raise InputError("tool: nothing was written to {out} or {out}.pt; expected a folder or a state dict there")
    return PackedReader(out) if "quantization_config" in read_config(out) else TensorReader(read_index(out))
