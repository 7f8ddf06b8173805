"""Gradients flow through all that blocks read of each other: importance against a whole model under autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.sensitivity import token_importance as sweeps
from hawqtool.sensitivity.label_gradients import draw_labels
from tests.support.replay64 import arguments_of, load
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

SEED = 5


@pytest.mark.parametrize("name", ["t5", "gemma4-shared", "gemma3n", "whisper"])
def test_importance_is_that_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_STORED", torch.float64)  # not two bytes a number between the sweeps
    kind = kind_named(name)
    folder, rows = save_kind(kind, tmp_path, torch.float32), calibration_inputs(kind)[:3]
    job = prepare(RunConfig(model=str(folder), device="cpu"), writes=False)
    found = sweeps.token_importance(
        job.stream(dtype=torch.float64), rows, sweeps.Portions(2, 1 << 30), SEED, lambda *_: None
    )

    model, outputs = load(kind, folder, torch.float64, attn_implementation="eager"), dict[str, Tensor]()

    def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str) -> None:
        output.retain_grad()
        outputs[name] = output

    for linear in job.structure.linears.values():
        module = model.get_submodule(linear.module_name)
        module.register_forward_hook(lambda m, i, o, name=linear.name: keep(m, i, o, name))
    generator, powers = torch.Generator().manual_seed(SEED), dict[str, list[Tensor]]()
    for row in rows:
        logits = model(**arguments_of(kind, model, row[None])).logits[0]
        labels = draw_labels(logits.detach().float().softmax(-1), generator)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, output in outputs.items():
            assert output.grad is not None
            powers.setdefault(name, []).append(output.grad.square().sum(-1)[0])
    assert set(found) == set(job.structure.linears)
    for name, parts in powers.items():
        expected = torch.stack(parts).sqrt()
        assert float((found[name].double() - expected / expected.mean()).abs().max()) < 1e-4, name  # norms in float32
