"""Streamed second derivatives against dense Hessians of a whole tiny model, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import Unit
from hawqtool.sensitivity.curvature.hvp import Curvature, Inputs, Pass, Prefix, Weights, products
from hawqtool.sensitivity.curvature.lanczos import top_eigenvalues
from hawqtool.sensitivity.curvature.spectral_density import spectrum
from hawqtool.sensitivity.curvature.trace import hawq_scores, probe_traces, trace_fields, unit_traces
from tests.support.tiny import tiny_model

VOCAB, LENGTH, ROWS, PROBES = 24, 6, 3, 64
PROBED = 2
"""Rows that probes are drawn for."""
OUTPUTS = LENGTH - 1


def _exact_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    """transformers' own goes through float32, which would hide errors of 1e-8."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.fixture(scope="module", autouse=True)
def exact_norms() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", _exact_norm)
        yield


def tiny_job(folder: Path, layers: int) -> Job:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_model("llama", folder, torch.float32, layers, vocab_size=VOCAB, initializer_range=0.3, **sizes)
    return prepare(RunConfig(model=str(folder), device="cpu", group_size="channel", quantize_lm_head=True))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return tiny_job(tmp_path_factory.mktemp("hessian") / "model", 2)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(job: Job) -> nn.Module:
    return whole_model(job)


def whole_model(job: Job) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval().requires_grad_(False)


def curvature(job: Job, rows: Tensor, seed: int = 0) -> Curvature:
    return Curvature(job.stream(dtype=torch.float64), rows, seed)


def loss_of(model: nn.Module, row: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Summed cross-entropy of the row's own next tokens."""
    logits = torch.func.functional_call(model, weights, (row[None],)).logits[0]
    return nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")


def unit_hessian(model: nn.Module, row: Tensor, unit: Unit) -> Tensor:
    """``[n, n]`` over the weights of all members, one row of double backward after the other."""
    leaves = [model.get_parameter(f"{m.name}.weight").clone().requires_grad_() for m in unit.members]
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(model, row, {f"{m.name}.weight": w for m, w in zip(unit.members, leaves, strict=True)})
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)])
        eye = torch.eye(len(grads), dtype=grads.dtype)
        found = torch.autograd.grad(grads, leaves, eye, is_grads_batched=True)
    return torch.cat([part.flatten(1) for part in found], 1)


@pytest.fixture(scope="module")
def hessians(job: Job, whole: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """``[rows, n, n]`` per unit, of each row's summed loss."""
    return {unit.name: torch.stack([unit_hessian(whole, row, unit) for row in tokens]) for unit in job.units}


def random_like(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def test_products_equal_double_backward(job: Job, whole: nn.Module, tokens: Tensor) -> None:
    found: dict[tuple[int, str], Tensor] = {}
    products(
        curvature(job, tokens),
        Weights(),
        [Pass(row, 0) for row in range(ROWS)],
        lambda _p, name, like: random_like(name, like),
        lambda p, name, _v, product: found.__setitem__((p.row, name), product),
    )
    names = list(job.structure.linears)
    for index, row in enumerate(tokens):
        leaves = {n: whole.get_parameter(f"{n}.weight").clone().requires_grad_() for n in names}
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(whole, row, {f"{n}.weight": w for n, w in leaves.items()})
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            slope = sum((g * random_like(n, g)).sum() for n, g in zip(names, grads, strict=True))
            expected = torch.autograd.grad(slope, list(leaves.values()))
        for name, product in zip(names, expected, strict=True):
            assert float((found[index, name] - product).norm() / product.norm()) < 1e-8, name


def test_the_rows_of_a_part_are_summed(job: Job, tokens: Tensor) -> None:
    sums: list[dict[str, Tensor]] = []
    for together in (1, 2, ROWS):  # the last part of two has one row
        total: dict[str, Tensor] = {}
        source = Curvature(job.stream(dtype=torch.float64), tokens, 0, together)
        products(
            source,
            Weights(),
            [Pass(part, 0) for part in range(len(source.parts))],
            lambda _p, name, like: random_like(name, like),
            lambda _p, name, _v, product, into=total: into.__setitem__(name, into.get(name, 0) + product),
        )
        sums.append(total)
    for name, expected in sums[0].items():
        for other in sums[1:]:
            assert float((other[name] - expected).norm() / expected.norm()) < 1e-10, name


def test_products_of_one_unit_are_its_block_of_the_hessian(
    job: Job, tokens: Tensor, hessians: dict[str, Tensor]
) -> None:
    source = curvature(job, tokens)
    hidden = source.advance(0, source.first_hidden)
    for unit in [u for u in job.units if u.members[0].block >= 1]:
        found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        products(
            source,
            Weights(),
            [Pass(row, 0) for row in range(ROWS)],
            lambda _p, name, like, names={m.name for m in unit.members}: (
                random_like(name, like) if name in names else None
            ),
            lambda p, name, v, product, into=found: into.__setitem__((p.row, name), (v, product)),
            Prefix(1, hidden),
        )
        for row in range(ROWS):
            v = torch.cat([found[row, m.name][0].flatten() for m in unit.members])
            product = torch.cat([found[row, m.name][1].flatten() for m in unit.members])
            expected = hessians[unit.name][row] @ v
            assert float((product - expected).norm() / expected.norm()) < 1e-8, unit.name


@pytest.fixture(scope="module")
def probed(job: Job, tokens: Tensor) -> dict[str, Tensor]:
    """``[rows, probes]`` per unit."""
    source = curvature(job, tokens[:PROBED])
    return unit_traces(job.units, probe_traces(source, Weights(), PROBES, 5, lambda *_: None))


def test_mean_of_probes_is_the_trace(job: Job, probed: dict[str, Tensor], hessians: dict[str, Tensor]) -> None:
    for unit in job.units:
        exact = hessians[unit.name][:PROBED].diagonal(dim1=1, dim2=2).sum(1) / OUTPUTS
        assert probed[unit.name].shape == (PROBED, PROBES)
        # Of given rows, the probes alone are random.
        stderr = probed[unit.name].std(1) / PROBES**0.5
        # About 18 comparisons: 3.5 standard errors are exceeded by one in 120 runs, and the seed is fixed.
        assert bool(((probed[unit.name].mean(1) - exact).abs() < 3.5 * stderr).all()), unit.name
        fields = trace_fields(probed[unit.name])
        assert fields["trace"] == pytest.approx(float(probed[unit.name].mean()))
        assert 0 <= fields["negative_share"] <= 1


def test_variance_of_a_probe_is_that_of_the_hessian(
    job: Job, probed: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    """Var vᵀHv = 2 Σ of squared off-diagonals for signs, and cross terms of other units, which add to it."""
    for unit in job.units:
        hessian = hessians[unit.name][:PROBED] / OUTPUTS
        own = 2 * (hessian.square().sum((1, 2)) - hessian.diagonal(dim1=1, dim2=2).square().sum(1))
        assert float((probed[unit.name].var(1) / own).mean()) > 0.7


def test_hawq_is_half_trace_over_weights_times_error(job: Job) -> None:
    unit = job.units[0]
    values = {m.name: torch.tensor([[1.0, 3.0], [-2.0, 0.0]], dtype=torch.float64) for m in unit.members}
    norms = {m.name: {"w4": 0.5} for m in unit.members}
    score = hawq_scores(job.units, values, norms)[unit.name]["w4"]
    scale = sum(0.5 * 0.5 / m.num_weights for m in unit.members)
    assert score.value == pytest.approx(0.5 * scale)  # the rows' means are 2 and -1
    assert score.stderr == pytest.approx(scale * (4.5 / 2) ** 0.5)
    # What is told of the trace itself: probes of one row are not independent, so only the rows count.
    fields = trace_fields(next(iter(values.values())))
    assert fields == pytest.approx({"trace": 0.5, "trace_stderr": (4.5 / 2) ** 0.5, "negative_share": 0.25})


def test_standard_errors_cover_the_truth(tmp_path: Path) -> None:
    """Rows drawn anew each time, one probe each: 68 and 95 % by Student's t, within a binomial margin."""
    seeds, rows = 100, 4
    job = tiny_job(tmp_path / "model", 1)
    whole = whole_model(job)
    pool = torch.randint(0, VOCAB, (5, LENGTH), generator=torch.Generator().manual_seed(8))
    unit = next(u for u in job.units if u.name.endswith("0.mlp.down_proj"))
    exact = [float(unit_hessian(whole, row, unit).trace()) / OUTPUTS for row in pool]
    truth = sum(exact) / len(exact)
    picks = torch.randint(0, len(pool), (seeds, rows), generator=torch.Generator().manual_seed(3))
    source = curvature(job, pool[picks.flatten()])
    values = probe_traces(source, Weights(), 1, 4, lambda *_: None)[unit.members[0].name].reshape(seeds, rows, 1)
    scaled = torch.tensor([(f["trace"] - truth) / f["trace_stderr"] for f in map(trace_fields, values)]).abs()
    # Student's t with 3 degrees of freedom: quantiles of 68 and 95 %.
    for share, quantile in ((0.68, 1.19), (0.95, 3.18)):
        margin = 3 * (share * (1 - share) / seeds) ** 0.5
        assert float((scaled < quantile).double().mean()) == pytest.approx(share, abs=margin)


def test_top_eigenvalues(job: Job, tokens: Tensor, hessians: dict[str, Tensor]) -> None:
    units, rows = job.units[::4], 2  # of both blocks, and the head
    assert {unit.members[0].block for unit in units} == {unit.members[0].block for unit in job.units}
    found = top_eigenvalues(curvature(job, tokens[:rows]), units, 18, 0, lambda *_: None)
    assert list(found) == [unit.name for unit in units]
    for unit in units:
        parts = torch.linalg.eigvalsh(hessians[unit.name][:rows] / OUTPUTS)
        mean = hessians[unit.name][:rows].mean(0) / OUTPUTS
        values = torch.linalg.eigvalsh((mean + mean.t()) / 2)
        top = float(values[values.abs().argmax()])
        fields = found[unit.name]
        assert fields["top_eigenvalue"] == pytest.approx(top, rel=1e-3), unit.name
        assert fields["residual"] < 0.03
        tops = torch.stack([p[p.abs().argmax()] for p in parts])
        assert fields["qbert"] == pytest.approx(abs(fields["eigenvalue_mean"]) + fields["eigenvalue_std"])
        assert fields["eigenvalue_mean"] == pytest.approx(float(tops.mean()), rel=1e-3), unit.name
        assert fields["eigenvalue_std"] == pytest.approx(float(tops.std()), rel=1e-3), unit.name


def input_trace(model: nn.Module, row: Tensor, unit: Unit) -> float:
    """Trace of the Hessian in a perturbation of the input that all members share."""
    shift: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(m.name).register_forward_pre_hook(lambda _m, x: (x[0] + shift["value"],))
        for m in unit.members
    ]
    shift["value"] = torch.zeros(1, LENGTH, unit.members[0].in_features, dtype=torch.float64, requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            (grad,) = torch.autograd.grad(loss_of(model, row, {}), shift["value"], create_graph=True)
            eye = torch.eye(grad.numel(), dtype=torch.float64).reshape(-1, *grad.shape)
            (rows,) = torch.autograd.grad(grad, shift["value"], eye, is_grads_batched=True)
    finally:
        for hook in hooks:
            hook.remove()
    return float(rows.flatten(1).trace())


def test_input_traces(job: Job, whole: nn.Module, tokens: Tensor) -> None:
    rows = tokens[:PROBED]
    traces = unit_traces(job.units, probe_traces(curvature(job, rows), Inputs(), PROBES, 6, lambda *_: None))
    for unit in job.units:
        exact = torch.tensor([input_trace(whole, row, unit) for row in rows], dtype=torch.float64) / OUTPUTS
        stderr = traces[unit.name].std(1) / PROBES**0.5
        assert bool(((traces[unit.name].mean(1) - exact).abs() < 3.5 * stderr).all()), unit.name


def test_measuring_leaves_no_weights_loaded(job: Job, tokens: Tensor) -> None:
    source = curvature(job, tokens[:1])
    probe_traces(source, Weights(), 1, 0, lambda *_: None)
    assert all(parameter.is_meta for block in source.stream.blocks for parameter in block.parameters())


def test_spectrum_has_the_exact_top_values_and_moments(job: Job, tokens: Tensor, hessians: dict[str, Tensor]) -> None:
    unit = next(u for u in job.units if u.name.endswith("1.self_attn.qkv_proj"))
    exact = torch.linalg.eigvalsh(hessians[unit.name].mean(0) / OUTPUTS)
    # All rows in one pass: only the sum over rows is wanted.
    source = Curvature(job.stream(dtype=torch.float64), tokens, 0, ROWS)
    found = spectrum(source, {m.name for m in unit.members}, 24, 4, 2, lambda *_: None)
    assert found.num_weights == len(exact)
    by_magnitude = exact[exact.abs().argsort(descending=True)]
    assert found.top[0][0] == pytest.approx(float(by_magnitude[0]), rel=1e-3)
    for value, residual in found.top:
        assert float((exact - value).abs().min()) <= residual + 1e-9
    assert torch.allclose(found.weights.sum(1), torch.ones(4, dtype=torch.float64))
    for order in (1, 2, 3):
        mean, stderr = found.moment(order)
        assert abs(mean - float((exact**order).mean())) < 4 * stderr, order
    grid, density = found.density(points=2001)
    step = float(grid[1] - grid[0])
    assert float(density.sum()) * step == pytest.approx(1, rel=1e-3)
    assert float((density * grid).sum()) * step == pytest.approx(found.moment(1)[0], rel=1e-2)
