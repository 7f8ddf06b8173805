"""Split experts against those of transformers, their statistics, and scores of layers that see part of the tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.model.experts import ExpertLinear, SplitExperts, counting_experts, split_experts
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics, is_held_out
from hawqtool.sensitivity.backward import _ByRow, _sums_by_row
from hawqtool.sensitivity.measure import SweepSettings, measure
from hawqtool.sensitivity.scores import LayerRows, score_rows
from hawqtool.streaming.input_statistics import group_statistics, stages
from tests.reference.sensitivity.test_scores import METRICS, slow_scores
from tests.support.tiny_zoo import kind_named, save_kind

KINDS = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")
TOKENS, TOP_K = 40, 2


def experts_of(name: str) -> tuple[Any, SplitExperts]:
    """transformers' experts with random weights, and ours with the same."""
    kind = kind_named(name)
    config = getattr(transformers, kind.config)(**kind.settings)
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, kind.model)(config)
    stacked = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    with torch.no_grad():
        stacked.gate_up_proj.normal_(std=0.3)
        stacked.down_proj.normal_(std=0.3)
    holder = nn.Module()
    holder.experts = stacked
    split_experts(holder)
    split = holder.experts
    assert isinstance(split, SplitExperts)
    for number, expert in enumerate(split.children()):
        gate, up = stacked.gate_up_proj[number].chunk(2)
        for linear, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", stacked.down_proj[number])):
            expert.get_submodule(linear).weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return stacked, split


def routed(split: SplitExperts, unused: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct expert numbers per token without the unused ones, and weights."""
    generator = torch.Generator().manual_seed(1)
    used = torch.tensor([n for n in range(len(list(split.children()))) if n not in unused])
    order = torch.rand(TOKENS, len(used), generator=generator).argsort(1)[:, :TOP_K]
    hidden = torch.randn(TOKENS, split.width, generator=generator)
    return hidden, used[order], torch.rand(TOKENS, TOP_K, generator=generator)


@pytest.mark.parametrize("least", [0, 30, 1000])
@pytest.mark.parametrize("unused", [(), (0,), (1, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_transformers(name: str, unused: tuple[int, ...], least: int) -> None:
    stacked, split = experts_of(name)
    arguments = routed(split, unused if name != "mixtral" else unused[:1])
    split.least_tokens = least
    with torch.no_grad():
        hidden, chosen, scales = arguments
        inputs = (hidden.double(), chosen, scales.double())
        torch.testing.assert_close(split.double()(*inputs), stacked.double()(*inputs), rtol=1e-10, atol=1e-10)


def test_a_choice_that_is_no_expert_is_nobodys() -> None:
    _, split = experts_of("qwen3-moe")
    hidden, chosen, weights = routed(split)
    masked = weights.clone()
    masked[::3, 1] = 0.0
    with torch.no_grad():
        expected = split(hidden, chosen, masked)
        chosen[::6, 1], chosen[3::6, 1] = split.layout.count, -1
        torch.testing.assert_close(split(hidden, chosen, weights), expected)


@pytest.mark.parametrize("least", [0, 16, 1000])
def test_experts_see_their_tokens_and_then_the_supplement(least: int) -> None:
    _, split = experts_of("olmoe")
    hidden, chosen, weights = routed(split, unused=(5,))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for number, expert in enumerate(split.children()):
        expert.get_submodule("up_proj").register_forward_pre_hook(
            lambda module, inputs, n=number: seen.update({n: (module.positions, inputs[0])})
        )
    split.least_tokens = least
    for _ in range(2):  # the second pass shows that nothing is drawn
        with torch.no_grad():
            split(hidden, chosen, weights)
        for number in range(8):
            own = [t for rank in range(TOP_K) for t in range(TOKENS) if chosen[t, rank] == number]
            if not own and not least:
                assert number not in seen
                continue
            positions, states = seen[number]
            assert positions.tolist() == own
            assert torch.equal(states[: len(own)], hidden[own])
            assert len(states) == min(max(len(own), least), TOKENS)
            rest = [int((hidden == state).all(1).nonzero()) for state in states[len(own) :]]
            assert len(set(rest)) == len(rest)
            assert not set(rest) & set(own)
            others = sorted(set(range(TOKENS)) - set(own))
            assert rest == [others[k * len(others) // len(rest)] for k in range(len(rest))]


def test_the_supplement_is_on_inside_the_context_alone() -> None:
    _, split = experts_of("mixtral")
    with pytest.raises(KeyError), counting_experts(split, 3):
        assert split.least_tokens == math.ceil(split.width / 3)
        raise KeyError
    assert split.least_tokens == 0


# Statistics and scores of a whole model, in one batch and in several.


@pytest.fixture(scope="module", params=["llama", "mixtral", "qwen3-moe"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = save_kind(kind_named(request.param), tmp_path_factory.mktemp("moe"), torch.float32)
    return prepare(RunConfig(model=str(folder), group_size=32, device="cpu"))


def rows(seed: int, count: int) -> Tensor:
    return torch.randint(3, 128, (count, 32), generator=torch.Generator().manual_seed(seed))


def statistics_of(job: Job, tokens: Tensor, batch_size: int, held_out: bool = False) -> dict[str, GroupStatistics]:
    stream = job.stream()
    activations = stream.embed(tokens, batch_size, held_out)
    spec = job.structure.blocks[0]
    with stream.block(0) as block:
        return {
            group[0].name: statistics
            for stage in stages(spec)
            for group, statistics in group_statistics(block, activations, stage)
        }


def test_group_statistics_do_not_depend_on_slices(job: Job) -> None:
    tokens = rows(4, 24)
    whole, sliced = statistics_of(job, tokens, 24), statistics_of(job, tokens, 8)
    assert set(whole) == set(sliced) == {group[0].name for group in job.structure.blocks[0].input_groups}
    for name, statistics in whole.items():
        other = sliced[name]
        assert other.num_routed == statistics.num_routed
        dense = ".experts." not in name
        assert not dense or statistics.num_routed == statistics.num_tokens == tokens.numel()
        # Where tokens are lent, they are others in other batches.
        if statistics.num_routed == statistics.num_tokens and other.num_routed == other.num_tokens:
            torch.testing.assert_close(other.gram, statistics.gram, rtol=1e-4, atol=1e-5)
        assert statistics.num_tokens >= statistics.num_routed


def test_held_out_tokens_of_experts_are_those_of_held_out_rows(job: Job) -> None:
    tokens = rows(4, 96)
    found = statistics_of(job, tokens, 8, held_out=True)
    # Run alone, the held-out rows reach the same experts; where none are lent, the moments agree.
    alone = statistics_of(job, tokens[is_held_out(torch.arange(len(tokens)))], 24)
    compared = 0
    for name, statistics in found.items():
        if statistics.num_routed == statistics.num_tokens and alone[name].num_routed == alone[name].num_tokens:
            assert statistics.held_out is not None
            assert statistics.held_out.num_tokens == alone[name].num_tokens
            torch.testing.assert_close(statistics.held_out.gram, alone[name].gram, rtol=1e-3, atol=1e-4)
            compared += ".experts." in name
    assert compared or not any(".experts." in name for name in found)


def test_corrections_for_rounded_inputs_refuse_experts(tmp_path: Path) -> None:
    folder = str(save_kind(kind_named("mixtral"), tmp_path, torch.float32))
    for values in ({"rounding": "gptaq"}, {"target_shift": "auto"}):
        with pytest.raises(UsageError, match=r"experts\.0\..* is an expert"):
            prepare(RunConfig(model=folder, group_size=32, device="cpu", **values))


def test_every_token_is_routed_to_as_many_experts_as_it_chooses(job: Job) -> None:
    found = {n: s for n, s in statistics_of(job, rows(4, 24), 8).items() if ".experts." in n}
    per_role: dict[str, int] = {}
    for name, statistics in found.items():
        role = name.rpartition(".")[2]
        per_role[role] = per_role.get(role, 0) + statistics.num_routed
    assert all(total == 24 * 32 * 2 for total in per_role.values())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_expert_without_tokens_gets_lent_ones(tmp_path: Path, batch_size: int) -> None:
    folder = save_kind(kind_named("mixtral"), tmp_path, torch.float32)
    job = prepare(RunConfig(model=str(folder), group_size=32, device="cpu"))
    found = statistics_of(job, rows(5, 1).expand(4, -1)[:, :1].contiguous(), batch_size)  # one token: two experts
    lent = [s for n, s in found.items() if ".experts." in n and s.num_routed == 0]
    assert lent
    for statistics in lent:
        assert statistics.num_tokens == 4
        assert bool(statistics.gram.isfinite().all())
        assert float(statistics.gram.diagonal().sum()) > 0


def test_scores_do_not_depend_on_slices_with_experts(job: Job) -> None:
    formats = (QuantFormat(2, 32), QuantFormat(4, 32))

    def measured(batch_size: int) -> Any:
        menu = {unit.name: formats for unit in job.units}
        rounding = RoundingSpec(RoundingMethod("rtn"), menu, job.stored_dtypes)
        sets = MeasurementRows(Rows(rows(4, 24), "test", "-"), rows(7, 24), batch_size)
        return measure(job.stream(), sets, rounding, SweepSettings(7), lambda *_: None).scores

    whole, sliced = measured(24), measured(8)
    for metric in METRICS:
        assert set(whole[metric]) == {unit.name for unit in job.units}
        for unit, by_label in whole[metric].items():
            for label, score in by_label.items():
                assert sliced[metric][unit][label].value == pytest.approx(score.value, rel=1e-3), (metric, unit)
                assert sliced[metric][unit][label].stderr == pytest.approx(score.stderr, rel=1e-3), (metric, unit)


def test_scores_of_a_share_of_the_tokens_equal_slow_loops() -> None:
    """`fisher` and `hawq-ggn` as if the other tokens had no gradient; `kron` by the means over those that it saw."""
    generator = torch.Generator().manual_seed(9)
    counts, positions, height, width = (3, 0, 6, 1), 6, 7, 10
    inputs = [torch.randn(count, width, generator=generator) for count in counts]
    grads = [torch.randn(count, height, generator=generator) for count in counts]
    error = torch.randn(height, width, generator=generator)
    values = score_rows([LayerRows(list(zip(inputs, grads, strict=True)), positions, positions)], [{"e": error}])[0]
    padded = [torch.zeros(len(counts), positions, size) for size in (width, height)]
    for row, count in enumerate(counts):
        padded[0][row, :count], padded[1][row, :count] = inputs[row], grads[row]
    expected = slow_scores(padded[0], padded[1], error)
    seen = sum(counts)
    power = sum((g.double() ** 2).sum(0) for g in grads) / seen
    moment = sum(x.double().t() @ x.double() for x in inputs) / seen
    share = seen / (len(counts) * positions)
    projected = (error.double() @ moment @ error.double().t()).diagonal()
    expected["kron"] = share / 2 * float((power * projected).sum())
    for metric in METRICS:
        assert float(values[metric]["e"].mean()) == pytest.approx(expected[metric], rel=1e-5), metric


def test_fewer_outputs_than_positions_scale_the_scores() -> None:
    generator = torch.Generator().manual_seed(10)
    x, g = torch.randn(4, 6, 10, generator=generator), torch.randn(4, 6, 7, generator=generator)
    error = {"e": torch.randn(7, 10, generator=generator)}
    rows = list(zip(x, g, strict=True))
    per_token, per_row = (score_rows([LayerRows(rows, 6, outputs)], [error])[0] for outputs in (6, 1))
    for metric in METRICS:
        torch.testing.assert_close(per_row[metric]["e"], 6 * per_token[metric]["e"])


def test_a_layer_without_any_token_scores_zero() -> None:
    empty = LayerRows([(torch.zeros(0, 5), torch.zeros(0, 4))] * 3, 6, 6)
    values = score_rows([empty], [{"e": torch.ones(4, 5)}])[0]
    assert all(float(values[metric]["e"].abs().sum()) == 0 for metric in METRICS)


def test_tokens_of_an_expert_go_to_their_rows() -> None:
    _, split = experts_of("qwen3-moe")
    rows_, positions = 5, 8
    hidden, chosen, weights = routed(split, unused=(2,))
    seen: dict[int, tuple[nn.Module, Tensor]] = {}
    for number, expert in enumerate(split.children()):
        expert.get_submodule("gate_proj").register_forward_hook(
            lambda module, inputs, _output, n=number: seen.update({n: (module, inputs[0])})
        )
    with torch.no_grad():
        split(hidden, chosen, weights)
    assert 2 not in seen
    by_row = _ByRow((module for module, _ in seen.values()), rows_, positions)
    values = []
    for number, (module, states) in seen.items():
        assert isinstance(module, ExpertLinear)
        values.append((states.double().sum(1), by_row.rows_of(module)))
        found = by_row.split(module, states)
        assert len(found) == rows_
        for row in range(rows_):
            inside = range(row * positions, (row + 1) * positions)
            own = [t for rank in range(TOP_K) for t in inside if chosen[t, rank] == number]
            assert torch.equal(found[row], hidden[own])
    used = (hidden.double().sum(1)[:, None] * (chosen != 2)).sum(1).view(rows_, positions).sum(1)
    torch.testing.assert_close(_sums_by_row(values, rows_), used)


@pytest.mark.parametrize("shape", [(3, 4, 6), (12, 6), (3, 4, 2, 6), (3, 2, 4, 6)])
def test_tokens_of_a_dense_layer_go_to_their_rows(shape: tuple[int, ...]) -> None:
    values = torch.arange(math.prod(shape)).view(shape)
    found = _ByRow((), 3, 4).split(nn.Linear(6, 2), values)
    assert all(torch.equal(part, whole) for part, whole in zip(found, values.reshape(3, -1, 6), strict=True))
