"""Weights of tokens against a whole model under autograd, and what weighted statistics and roundings are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.export.packed_reader import PackedReader
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.refine import BlockRefiner, split_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan, Rows, TokenImportance, UnitFormats
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.learned.block import Schedule
from hawqtool.rounding.method import Task
from hawqtool.rounding.statistics import GroupStatistics, is_held_out
from hawqtool.sensitivity import token_importance as weighing_sweeps
from hawqtool.streaming import stream as sweep
from hawqtool.streaming.input_statistics import collect_statistics, group_statistics
from tests.support.importance64 import slow_importance
from tests.support.tiny import CONFIGS, tiny_model
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

ROWS, LENGTH, SEED = 6, 20, 5
TOKENS = torch.randint(3, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
ROOM = 1 << 30


def make_job(folder: Path, **values: object) -> Job:
    return prepare(RunConfig.model_validate({"model": str(folder), "group_size": 32, "device": "cpu", **values}))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tiny_model(request.param, tmp_path_factory.mktemp("weights") / request.param, dtype=torch.float32)
    return make_job(folder)


def weights_of(job: Job, per_batch: int = 2, room: int = ROOM, exponent: float = 0.5) -> TokenImportance:
    portions = weighing_sweeps.Portions(per_batch, room)
    return weighing_sweeps.token_importance(job.stream(), TOKENS, portions, SEED, lambda *_: None, exponent)


@pytest.mark.parametrize(("stored", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_they_are_the_gradients_of_the_whole_model(
    job: Job, exponent: float, stored: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but for hidden states that wait in fewer bits for the reverse sweep."""
    assert torch.bfloat16 == weighing_sweeps._STORED
    monkeypatch.setattr(weighing_sweeps, "_STORED", stored)
    found, expected = weights_of(job, exponent=exponent), slow_importance(job, TOKENS, exponent, SEED)
    assert set(found) == set(job.structure.linears)
    for name, weights in expected.items():
        assert found[name].shape == (ROWS, LENGTH) and found[name].dtype == torch.float32
        error = (found[name] - weights).norm() / weights.norm()
        assert float(error) < bound, (name, float(error))


def test_neither_room_nor_slices_matter(job: Job) -> None:
    whole = weights_of(job, per_batch=2)
    # Room for nothing keeps one batch at a time, to the bit; other batches are other sums.
    for room, per_batch, tolerance in ((0, 2, 0.0), (ROOM, 5, 1e-4)):
        for name, weights in weights_of(job, per_batch, room).items():
            torch.testing.assert_close(weights, whole[name], rtol=tolerance, atol=tolerance)


def test_walking_blocks_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing_sweeps, "_STORED", torch.float32)
    job = make_job(tiny_model("llama", tmp_path / "model", dtype=torch.float32, layers=7))
    state, found = LENGTH * 64 * 4, list[TokenImportance]()
    # States before all blocks; before every second and third one; of the rows of two batches, then of one.
    for held, together, spacing in ((7, 6, 1), (5, 6, 2), (4.4, 4, 3), (0, 2, 3)):
        room = int(held * ROWS * state)
        assert weighing_sweeps.Portions(2, room).plan(state, 7, ROWS, walks_again=True) == (together, spacing)
        found.append(weights_of(job, room=room))
    assert weighing_sweeps.Portions(2, 5 * ROWS * state).plan(state, 7, ROWS, walks_again=False) == (4, 1)
    assert all(torch.equal(weights, other[name]) for other in found[1:] for name, weights in found[0].items())


@pytest.mark.parametrize("positions", [1, 7, 20])
def test_how_many_logits_are_held_does_not_matter(job: Job, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, states = weights_of(job), job.stream().final_hidden(TOKENS, 2, lambda _: None)
    noisy = states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    expected = OutputComparison(job.stream(), job.stream(), TOKENS, states).evaluation(noisy)
    monkeypatch.setattr(sweep, "_POSITIONS", positions)
    for name, weights in weights_of(job).items():
        torch.testing.assert_close(weights, whole[name], rtol=1e-4, atol=1e-4)
    found = OutputComparison(job.stream(), job.stream(), TOKENS, states).evaluation(noisy)
    assert found.row_divergence == pytest.approx(expected.row_divergence, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.same_top == pytest.approx(expected.same_top)


def test_exponent_zero_weighs_all_alike(job: Job) -> None:
    assert all(torch.equal(weights, torch.ones(ROWS, LENGTH)) for weights in weights_of(job, exponent=0.0).values())


# What the weights do.


def statistics_of(
    job: Job, per_batch: int, weights: TokenImportance | None, held_out: bool
) -> dict[str, GroupStatistics]:
    """Of the first block, as rounding sees them, through both ways of walking a block."""
    stream = job.stream()
    found: dict[str, GroupStatistics] = {}
    known = stream.embed(TOKENS, per_batch, held_out, importance=weights)
    with stream.block(0) as block:
        collect_statistics(block, known, lambda groups: found.update({g[0].name: s for g, s in groups}))
    return found


def block_inputs(job: Job) -> dict[str, Tensor]:
    """Inputs of the first block's linears, ``[rows, positions, in]`` float64."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    seen: dict[str, Tensor] = {}
    for linear in job.structure.blocks[0].linears:
        model.get_submodule(linear.module_name).register_forward_pre_hook(
            lambda _m, inputs, name=linear.name: seen.update({name: inputs[0].detach()})
        )
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return seen


@pytest.mark.parametrize("per_batch", [ROWS, 4])
def test_gram_matrices_are_weighted_means(job: Job, per_batch: int) -> None:
    weights, held = weights_of(job), is_held_out(torch.arange(ROWS))
    found = statistics_of(job, per_batch, weights, held_out=True)
    for name, x in block_inputs(job).items():
        for rows, statistics in ((torch.ones(ROWS, dtype=torch.bool), found[name]), (held, found[name].held_out)):
            assert statistics is not None and statistics.num_tokens == int(rows.sum()) * LENGTH
            expected = torch.einsum("rti,rtj,rt->ij", x[rows], x[rows], weights[name][rows].double())
            error = statistics.gram - expected / statistics.num_tokens
            assert float(error.norm() / statistics.gram.norm()) < 1e-5


def test_equal_weights_change_nothing(job: Job) -> None:
    ones = {name: torch.ones_like(weights) for name, weights in weights_of(job).items()}
    plain, weighted = (statistics_of(job, ROWS, weights, False) for weights in (None, ones))
    for group in job.structure.blocks[0].input_groups:
        assert all(torch.equal(plain[group[0].name].gram, weighted[linear.name].gram) for linear in group)


def test_the_weighted_error_of_a_layer_gets_smaller(job: Job) -> None:
    weights, x = weights_of(job), block_inputs(job)
    plain, weighted = (statistics_of(job, ROWS, some, False) for some in (None, weights))
    spec, reader = job.structure.blocks[0], job.stream().source
    errors = {False: 0.0, True: 0.0}
    for first, linear in ((group[0].name, linear) for group in spec.input_groups for linear in group):
        for is_weighted, statistics in ((False, plain[first]), (True, weighted[linear.name])):
            weight = reader.tensor(f"{linear.name}.weight").float()
            task = Task(linear.name, weight, menu_of(job, 3)[linear.unit], torch.float32)
            rounded = round_group([task], factorize(statistics.gram, statistics.num_tokens), job.settings.method)[0]
            moved = x[linear.name] @ (dequantize(*rounded) - weight).double().t()
            errors[is_weighted] += float((moved.square().sum(-1) * weights[linear.name]).sum())
    assert errors[True] < errors[False]


def menu_of(job: Job, bits: int) -> UnitFormats:
    return uniform_formats(job.units, bits, 32)


def test_other_tokens_than_were_weighed_are_refused(job: Job) -> None:
    weights = {name: values[:, 1:] for name, values in weights_of(job).items()}
    with pytest.raises(InputError, match="120 inputs of a linear, expected the 114 .*--token-importance none"):
        statistics_of(job, ROWS, weights, False)


# In a run.


def rounded(job: Job, rows: Rows, folder: Path) -> dict[str, Tensor]:
    formats = menu_of(job, 3)
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))
    round_to_folder(RunContext(job), plan, rows, folder, "test")
    return {name: PackedReader(folder).codes(name)[0] for name in job.structure.linears}


@pytest.mark.parametrize("steps", [0, 2])
def test_all_roundings_use_them(tmp_path: Path, steps: int) -> None:
    """Also where refinement holds rows out."""
    source = tiny_model("llama", tmp_path / "m")
    codes = {}
    for kind in ("none", "gradient"):
        job = make_job(source, token_importance=kind, refine_steps=steps)
        rows = with_token_importance(RunContext(job), Rows(TOKENS, "test", "-"))
        assert (rows.importance is None) == (kind == "none")
        codes[kind] = rounded(job, rows, tmp_path / kind)
    same = [name for name in codes["none"] if torch.equal(codes["none"][name], codes["gradient"][name])]
    assert not same, same


def test_refinement_rounds_with_the_weights_of_its_own_rows(job: Job) -> None:
    weights = weights_of(job)
    walked = BlockRefiner(job, job.stream(), Rows(TOKENS, "test", "-", weights), Schedule(2)).walked
    fitting = split_rows(TOKENS)[0]
    kept = [next(i for i, row in enumerate(TOKENS) if torch.equal(row, some)) for some in fitting]
    assert len(kept) < ROWS and walked.importance is not None
    assert all(torch.equal(walked.importance[name], values[kept]) for name, values in weights.items())


def test_auto_leaves_plain_rounding_alone(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "m")
    wanted = {"rtn": False, "gptq": True, "foem": True, "gptaq": True}
    assert {name: make_job(source, rounding=name).settings.uses_token_importance for name in wanted} == wanted
    assert make_job(source, rounding="rtn", token_importance="gradient").settings.uses_token_importance


@pytest.mark.parametrize("name", ["mixtral", "bert", "vit", "gpt2"])
def test_other_kinds_of_models(name: str, tmp_path: Path) -> None:
    """Experts have no weights, and models with one output per row do have them."""
    kind = kind_named(name)
    job = make_job(save_kind(kind, tmp_path / name), profile="vllm")
    rows = calibration_inputs(kind)
    found = with_token_importance(RunContext(job), Rows(rows, "test", "-")).importance
    assert found is not None
    assert set(found) == {name for name in job.structure.linears if ".experts." not in name}
    assert all(float(w.mean()) == pytest.approx(1, rel=1e-5) and len(w) == len(rows) for w in found.values())
    stream, spec = job.stream(), job.structure.blocks[0]
    known = stream.embed(rows, 4, importance=found)
    with stream.block(0) as block:
        for group, statistics in group_statistics(block, known, spec.input_groups):
            assert bool(torch.isfinite(statistics.gram).all()), group[0].name
