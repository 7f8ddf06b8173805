"""Largest inputs of units, as plain hooks of the loaded model find them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.streaming.input_peaks import input_peaks
from tests.support.tiny import tiny_llama


def test_peaks_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    folder, rows = tiny_llama(tmp_path / "model"), torch.arange(96).view(4, 24)
    job = prepare(RunConfig(model=str(folder), device="cpu"), writes=False)
    units = {unit.name: [member.name for member in unit.members] for unit in job.units[:-1]}
    found = input_peaks(job.stream(), rows, 3, set(units))
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[str, float]()

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    with torch.no_grad():
        for part in rows.split(3):
            model(part)
    assert found == {unit: max(map(seen.__getitem__, members)) for unit, members in units.items()}
