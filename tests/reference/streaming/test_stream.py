"""The streamed walk gives the codes of a slow, truly sequential replay on a live transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.export.packed_reader import PackedReader
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan, LinearSpec, Rows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.gram import gram
from hawqtool.rounding.grid import dequantize, nearest_codes, search_scales
from hawqtool.rounding.layer import round_layers
from hawqtool.rounding.method import Task
from hawqtool.rounding.statistics import GroupStatistics, is_held_out
from hawqtool.streaming.input_statistics import collect_statistics
from tests.support.tiny import CONFIGS, tiny_model

TOKENS = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(4))
ROWS = Rows(TOKENS, "test", "-")
WIDTHS = (3, 4, 2, 8)


class _Reached(Exception):
    """The input of interest was seen."""


def make_job(folder: Path, batch_size: int) -> Job:
    config = RunConfig(model=str(folder), group_size=32, batch_size=batch_size, device="cpu", target_shift="off")
    return prepare(config)


def mixed_plan(job: Job) -> BitPlan:
    formats = {
        unit.name: uniform_formats((unit,), WIDTHS[i % len(WIDTHS)], 32)[unit.name] for i, unit in enumerate(job.units)
    }
    return BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))


def input_of(model: nn.Module, name: str) -> Tensor:
    """Input of a linear, ``[tokens, in]``, in a forward pass from the embeddings."""
    held: list[Tensor] = []

    def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        held.append(inputs[0].flatten(0, -2))
        raise _Reached

    hook = model.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad(), pytest.raises(_Reached):
        model(TOKENS, use_cache=False)
    hook.remove()
    return held[0]


def round_live(job: Job, model: nn.Module, plan: BitPlan, group: tuple[LinearSpec, ...]) -> dict[str, Tensor]:
    x = input_of(model, group[0].name)
    matrix = gram(x)
    tasks = [
        Task(m.name, weight.detach().clone(), plan.formats[m.unit], job.stored_dtypes[m.name])
        for m in group
        for weight in [model.get_submodule(m.name).weight]
    ]
    layers = round_layers(
        tasks, GroupStatistics(matrix, len(x), len(x)), factorize(matrix, len(x)), job.settings.method
    )
    for layer in layers:
        with torch.no_grad():
            model.get_submodule(layer.name).weight.copy_(dequantize(layer.codes, layer.scales))
    return {layer.name: layer.codes for layer in layers}


def replay(job: Job, plan: BitPlan) -> tuple[dict[str, Tensor], nn.Module]:
    """Every input group on the model as it stands after all groups before it."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval()
    codes: dict[str, Tensor] = {}
    for block in job.structure.blocks:
        for group in block.input_groups:
            codes |= round_live(job, model, plan, group)
    return codes, model


def equal_share(expected: dict[str, Tensor], folder: Path) -> dict[str, float]:
    reader = PackedReader(folder)
    return {name: float((reader.codes(name)[0] == codes).float().mean()) for name, codes in expected.items()}


def divergence(original: nn.Module, candidate: nn.Module) -> float:
    with torch.no_grad():
        log_p, log_q = (m(TOKENS).logits.log_softmax(-1) for m in (original, candidate))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def restored(job: Job, folder: Path) -> nn.Module:
    """The live model with the written weights."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval()
    reader = PackedReader(folder)
    with torch.no_grad():
        for name in job.structure.linears:
            model.get_submodule(name).weight.copy_(reader.tensor(f"{name}.weight"))
    return model


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_codes_equal_a_sequential_replay(kind: str, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path / "m", layers=3)
    whole, sliced = make_job(source, len(TOKENS)), make_job(source, 1)
    plan = mixed_plan(whole)
    expected, quantized = replay(whole, plan)
    assert set(expected) == set(whole.structure.linears)
    round_to_folder(RunContext(whole), plan, ROWS, tmp_path / "whole", "test")
    shares = equal_share(expected, tmp_path / "whole")
    assert min(shares.values()) >= 0.999, shares

    round_to_folder(RunContext(sliced), plan, ROWS, tmp_path / "sliced", "test")
    shares = equal_share(expected, tmp_path / "sliced")
    assert sum(shares.values()) / len(shares) >= 0.95, shares
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    kl = divergence(original, quantized)
    assert divergence(original, restored(whole, tmp_path / "whole")) == pytest.approx(kl, rel=0.01)
    assert divergence(original, restored(sliced, tmp_path / "sliced")) == pytest.approx(kl, rel=0.1)


def test_a_block_sees_the_rounding_of_the_blocks_before_it(tmp_path: Path) -> None:
    job = make_job(tiny_model("llama", tmp_path / "m"), len(TOKENS))
    plan = mixed_plan(job)
    first = job.units[0].name
    wider = BitPlan(plan.formats | {first: uniform_formats(job.units, 8, 32)[first]}, 0, plan.num_weights)
    codes = []
    for name, item in (("a", plan), ("b", wider)):
        round_to_folder(RunContext(job), item, ROWS, tmp_path / name, name)
        codes.append(PackedReader(tmp_path / name).codes("model.layers.1.mlp.down_proj")[0])
    assert float((codes[0] != codes[1]).float().mean()) > 0.001


def walked_statistics(job: Job, plan: BitPlan) -> dict[str, GroupStatistics]:
    """Statistics that the walk shows while each group is rounded by plan."""
    found: dict[str, GroupStatistics] = {}
    stream, formats = job.stream(), job.layer_formats(plan.formats)
    activations = stream.embed(TOKENS, job.settings.batch_size, held_out=True, with_original=True)
    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:

            def visit(
                group: Sequence[LinearSpec],
                statistics: GroupStatistics,
                block: LoadedBlock = block,
            ) -> None:
                found[group[0].name] = statistics
                for linear in group:
                    weight = block.weight(linear)
                    ones, fmt = torch.ones(weight.shape[1]), formats[linear.name]
                    scales = search_scales(weight, ones, fmt, torch.bfloat16, both_signs=True)
                    block.set_weight(linear, dequantize(nearest_codes(weight, scales, fmt), scales))

            collect_statistics(block, activations, lambda groups: [visit(*group) for group in groups])
    return found


def test_the_drift_is_taken_at_the_outputs_of_linears_that_have_few(tmp_path: Path) -> None:
    job = make_job(tiny_model("llama", tmp_path / "m", layers=1, intermediate_size=160), 3)
    seen: list[list[tuple[Sequence[LinearSpec], GroupStatistics]]] = [[], []]
    for at_outputs, found in enumerate(seen):
        stream = job.stream()
        activations = stream.embed(TOKENS, job.settings.batch_size, with_original=True)
        activations.at_outputs = bool(at_outputs)
        activations.hidden[1] = 1.1 * activations.hidden[1]
        with stream.block(0) as block:
            down = block.spec.linears[-1]
            weight = block.weight(down).clone()
            collect_statistics(block, activations, found.extend)
    for (group, inputs), (_, outputs) in zip(*seen, strict=True):
        if group[0].name != down.name:
            assert inputs.drift is not None and outputs.drift is not None and torch.equal(inputs.drift, outputs.drift)
            continue
        assert inputs.drift is not None and outputs.drift is None and outputs.output_drift is not None
        torch.testing.assert_close(outputs.output_drift, weight @ inputs.drift, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_the_original_runs_beside_the_quantized_prefix(batch_size: int, tmp_path: Path) -> None:
    """Drift and held-out moments are those of inputs taken from two live models."""
    job = make_job(tiny_model("llama", tmp_path / "m", layers=3), batch_size)
    plan = mixed_plan(job)
    found = walked_statistics(job, plan)
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval() for _ in range(2)
    )
    held = is_held_out(torch.arange(len(TOKENS))).repeat_interleave(TOKENS.shape[1])
    drifts = []
    for block in job.structure.blocks:
        for group in block.input_groups:
            x, x0 = (input_of(model, group[0].name) for model in (quantized, original))
            statistics = found[group[0].name]
            assert statistics.held_out is not None and statistics.held_out.num_tokens == int(held.sum())
            for part, mask in ((statistics, torch.ones_like(held)), (statistics.held_out, held)):
                expected = (x0 - x)[mask].t() @ x[mask] / int(mask.sum())
                assert part.drift is not None
                torch.testing.assert_close(part.gram, gram(x[mask]), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(part.drift, expected, rtol=1e-3, atol=1e-4)
            drifts.append(float(statistics.drift.norm() / statistics.gram.norm()))  # type: ignore[union-attr]
            for m in group:
                weight, fmt = quantized.get_submodule(m.name).weight.detach(), plan.formats[m.unit]
                scales = search_scales(weight, torch.ones(weight.shape[1]), fmt, torch.bfloat16, both_signs=True)
                weight.copy_(dequantize(nearest_codes(weight, scales, fmt), scales))
    assert drifts[0] == 0 and min(drifts[1:]) > 1e-3


def test_stored_buffers_are_loaded(tmp_path: Path) -> None:
    """Every persistent buffer of a checkpoint counts: scalars of layers here, routing biases elsewhere."""
    config = Gemma4TextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    Gemma4ForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    rows, file = torch.arange(8)[None], tmp_path / "model.safetensors"
    states = [
        prepare(RunConfig(model=str(tmp_path), group_size=32, device="cpu")).stream().final_hidden(rows, 1, print)
    ]
    tensors = load_file(file)
    buffers = [name for name in tensors if name.endswith("layer_scalar")]
    assert len(buffers) == 2
    for name in buffers:
        save_file(tensors | {name: 0.5 * tensors[name]}, file, {"format": "pt"})
        job = prepare(RunConfig(model=str(tmp_path), group_size=32, device="cpu"))
        states.append(job.stream().final_hidden(rows, 1, print))
    assert all(float((state - states[0]).abs().max()) > 1e-3 for state in states[1:])
    loaded = Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model
    with torch.no_grad():
        hidden = loaded.norm(states[-1])
        assert torch.allclose(hidden, loaded(rows, use_cache=False).last_hidden_state, atol=1e-5)


def test_sets_of_rows_in_one_walk_end_as_each_by_itself(tmp_path: Path) -> None:
    stream, sets = make_job(tiny_model("llama", tmp_path / "m"), 2).stream(), {"long": TOKENS, "short": TOKENS[:3, :7]}
    alone, walked = {name: stream.final_hidden(rows, 2, lambda _: None) for name, rows in sets.items()}, list[int]()
    found = stream.final_states(sets, 2, walked.append)
    assert all(torch.equal(found[name], states) for name, states in alone.items())
    assert walked == list(range(len(stream.blocks)))
