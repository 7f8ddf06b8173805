"""Token importance of a whole live model in float64, a row at a time: the oracle for the two sweeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.pipeline.run.job import Job
from hawqtool.sensitivity.label_gradients import draw_labels


def slow_importance(job: Job, tokens: Tensor, exponent: float, seed: int = 0) -> dict[str, Tensor]:
    """Importance ``[rows, positions]`` float64 by linear, from labels drawn as the sweep draws them."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    outputs: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str) -> None:
        output.retain_grad()
        outputs[name] = output

    for name in job.structure.linears:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: keep(m, i, o, name))
    generator, powers = torch.Generator().manual_seed(seed), dict[str, list[Tensor]]()
    for row in tokens:
        logits = model(row[None], use_cache=False).logits[0]
        labels = draw_labels(logits.detach().float().softmax(-1), generator)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for spec in job.structure.blocks:
            for linear in spec.linears:
                gradient = outputs[linear.module_name].grad
                assert gradient is not None
                powers.setdefault(linear.name, []).append(gradient.square().sum(-1)[0])
    found = {name: torch.stack(parts) ** exponent for name, parts in powers.items()}
    return {name: weights / weights.mean() for name, weights in found.items()}
