"""Moments behind output feedback and refinement against a whole model under autograd, and what they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.run.checkpoints import Checkpoints
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages import token_importance as stage
from hawqtool.records import OutputMoments, Rows
from hawqtool.rounding import output_feedback
from hawqtool.rounding.output_feedback import unpack_lower
from hawqtool.sensitivity import token_importance as sweeps
from hawqtool.sensitivity.label_gradients import draw_labels
from tests.support.tiny import tiny_model
from tests.support.tiny_zoo import kind_named, save_kind

ROWS, LENGTH = 8, 12
TOKENS = torch.randint(3, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))


def make_job(folder: Path, **values: Any) -> Job:
    shared = {"model": str(folder), "group_size": 32, "device": "cpu", "output_feedback": "auto"}
    return prepare(RunConfig.model_validate(shared | values))


def moments_of(context: RunContext) -> dict[str, OutputMoments]:
    return dict(stage.with_token_importance(context, Rows(TOKENS, "test", "-"), for_feedback=True).output_moments)


def slow_moments(job: Job, rows: list[int]) -> dict[str, Tensor]:
    """Sums of g gᵀ / ‖g‖ over some rows, each through the whole model in float64, labels drawn as the sweep does.

    At the output y of a block g is times ‖y‖.
    """
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    outputs: dict[str, Tensor] = {}

    def keep(output: Tensor, name: str) -> None:
        output.retain_grad()
        outputs[name] = output

    blocks = {spec.name for spec in job.structure.blocks}
    for name in (*job.structure.linears, *blocks):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: keep(o, name))
    generator, found = torch.Generator().manual_seed(job.config.seed), dict[str, Tensor]()
    for number, row in enumerate(TOKENS):
        logits = model(row[None], use_cache=False).logits[0]
        labels = draw_labels(logits.detach().float().softmax(-1), generator)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, output in outputs.items():
            gradient = output.grad[0]  # type: ignore[index]
            if name in blocks:
                gradient = gradient * output[0].detach().norm(dim=1, keepdim=True)
            unit = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-300)
            found[name] = found.get(name, 0) + (unit.T @ gradient if number in rows else 0)
    return found


@pytest.mark.parametrize(("steps", "seen"), [(0, 8), (2, 7)])
def test_they_are_the_gradients_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, seen: int
) -> None:
    """Refinement's held-out rows are in none of them; one batch at a time, or one of all rows, changes nothing."""
    monkeypatch.setattr(sweeps, "_STORED", torch.float32)
    monkeypatch.setattr(output_feedback, "WORTHWHILE", 1e9)
    source = tiny_model("llama", tmp_path / "m", dtype=torch.float32)
    # Settings are chosen on held-out rows in one case, blocks refined in the other.
    values: dict[str, Any] = {"refine_error": "loss"} if steps else {"target_shift": "auto"}
    job = make_job(source, refine_steps=steps, **values)
    found = moments_of(RunContext(job))
    whole, other = slow_moments(job, [*range(seen)]), slow_moments(job, [3, 6])
    refined = {spec.name for spec in job.structure.blocks} if steps else set()
    assert set(found) == {n for n, m in job.structure.linears.items() if m.out_features <= 2 * m.in_features} | refined
    for name, moments in found.items():
        assert moments.lower is not None and (moments.held_out is None) == (steps > 0)
        pairs = [(moments.lower, whole[name])] + ([] if moments.held_out is None else [(moments.held_out, other[name])])
        for lower, expected in pairs:
            assert float((unpack_lower(lower) - expected).norm() / expected.norm()) < 1e-3, name
    for changed, value in (("_CPU_BYTES", 1), ("importance_rows", lambda *_: ROWS)):
        monkeypatch.setattr(stage, changed, value)
        for name, moments in moments_of(RunContext(job)).items():
            torch.testing.assert_close(moments.lower, found[name].lower, rtol=1e-4, atol=1e-6)


def test_they_are_kept_and_made_again_where_they_are_damaged(tmp_path: Path) -> None:
    job = make_job(tiny_model("llama", tmp_path / "m"), output_feedback="re:.*[qk]_proj$")
    said: list[str] = []
    store = Checkpoints(tmp_path, warn=said.append)
    first = moments_of(RunContext(job, saved=store))
    assert set(first) == {name for name in job.structure.linears if name.endswith(("q_proj", "k_proj"))}
    file = next(tmp_path.glob("*output-moments*"))
    content = bytearray(file.read_bytes())
    for damaged in (False, True):
        if damaged:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        again = moments_of(RunContext(job, saved=store))
        assert bool(said) == damaged
        for name, moments in first.items():
            assert (moments.ratio, moments.damping) == (again[name].ratio, again[name].damping)
            assert moments.lower is None or torch.equal(moments.lower, again[name].lower)  # type: ignore[arg-type]


def test_who_has_none(tmp_path: Path) -> None:
    experts = make_job(save_kind(kind_named("mixtral"), tmp_path / "experts"), profile="vllm")
    assert experts.feedback_layers and not any(".experts." in name for name in experts.feedback_layers)
    source = tiny_model("llama", tmp_path / "m")
    assert not make_job(source, output_feedback="off").feedback_layers
    with pytest.raises(UsageError, match=r"--output-feedback re:.*zz matches no layer .* nearest names"):
        make_job(source, output_feedback="re:.*zz")
    for steps, least in ((0, 4), (1, 5)):
        with pytest.raises(UsageError, match=f"every 4th calibration row .* found --num-samples {least - 1}"):
            make_job(source, num_samples=least - 1, refine_steps=steps)
        make_job(source, num_samples=least, refine_steps=steps)
