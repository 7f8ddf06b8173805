"""Distillation against slow float64 arithmetic: weights, gradients through all blocks, and what it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized, dequantize, nearest_codes, search_grid
from hawqtool.rounding.learned.block import Forward
from hawqtool.rounding.learned.end_to_end import Distilled, DistillRows, DistillSchedule, TrainableBlock, distill
from hawqtool.rounding.learned.fake_quant import FlatLayers, FlatScales
from hawqtool.rounding.learned.training import batch_order
from hawqtool.rounding.spec import InitialRounding
from hawqtool.runtime.determinism import FixedOrder

WIDTH, ROWS, POSITIONS, CLASSES = 64, 4, 8, 11
FORMATS = {"in": QuantFormat(3, 32), "mid": QuantFormat(4, 32, symmetric=False), "out": QuantFormat(2, 64)}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(block: int, name: str) -> Tensor:
    return random(WIDTH, WIDTH, seed=10 * block + sorted(FORMATS).index(name)) / WIDTH**0.5


def rounded(block: int, name: str, dtype: torch.dtype) -> Quantized:
    original, fmt = weight(block, name).float(), FORMATS[name]
    scales, zeros = search_grid(original, torch.ones(WIDTH), fmt, dtype, both_signs=True)
    return Quantized(nearest_codes(original, scales, fmt, zeros), scales, zeros)


def start(block: int, name: str, dtype: torch.dtype) -> InitialRounding:
    """Named by its block too, as results hold the layers of all trainable_blocks."""
    return InitialRounding(f"{block}.{name}", weight(block, name).float(), rounded(block, name, dtype), FORMATS[name])


def gain(block: int) -> Tensor:
    return 1 + 0.1 * random(WIDTH, seed=100 + block)


HEAD = random(CLASSES, WIDTH, seed=200) / WIDTH**0.5


def forward(weights: Mapping[str, Tensor], x: Tensor, _batch: int) -> Tensor:
    normed = x / x.square().mean(-1, keepdim=True).sqrt() * weights["norm"]
    return x + torch.tanh(normed @ weights["in"].t() @ weights["mid"].t()) @ weights["out"].t()


def trainable_blocks(dtype: torch.dtype) -> list[TrainableBlock]:
    def run(block: int) -> Forward:
        return lambda found, x, batch: forward({n.removeprefix(f"{block}."): w for n, w in found.items()}, x, batch)

    return [
        TrainableBlock(
            [start(block, name, dtype) for name in FORMATS],
            {"norm": (gain(block).float(), dtype)},
            run(block),
        )
        for block in range(2)
    ]


def inputs(count: int) -> list[Tensor]:
    return [random(ROWS, POSITIONS, WIDTH, seed=300 + n).float() for n in range(count)]


def log_p(x: Tensor) -> Tensor:
    """Of the original model, float64."""
    hidden = x.double()
    for block in range(2):
        hidden = forward({name: weight(block, name) for name in FORMATS} | {"norm": gain(block)}, hidden, 0)
    return (hidden @ HEAD.t()).log_softmax(-1)


def divergences(hidden: Tensor, x: Tensor) -> Tensor:
    """KL of every row from an output of the last piece, float64."""
    expected = log_p(x)
    log_q = (hidden.double() @ HEAD.t()).log_softmax(-1)
    return (expected.exp() * (expected - log_q)).sum(-1).mean(-1)


class Comparison:
    """With the original, of one batch."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def divergence(self, hidden: Tensor) -> Tensor:
        return divergences(hidden, self.batch)

    def gradient(self, hidden: Tensor) -> Tensor:
        leaf = hidden.detach().double().requires_grad_()
        with torch.enable_grad():
            found: Tensor = torch.autograd.grad(divergences(leaf, self.batch).mean(), leaf)[0]
        return found.to(hidden.dtype)


def comparisons(batches: list[Tensor]) -> list[Comparison]:
    return [Comparison(batch) for batch in batches]


def run(schedule: DistillSchedule, dtype: torch.dtype = torch.bfloat16) -> Distilled:
    batches = inputs(8)
    return distill(trainable_blocks(dtype), DistillRows(batches, 6, comparisons(batches)), schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [FlatScales, lambda starts: FlatLayers(starts, 1.0)], ids=["scales", "codes"])
def test_weights_are_those_that_loaders_compute(kind: Callable[..., Any], dtype: torch.dtype) -> None:
    for name in FORMATS:
        layer = rounded(0, name, dtype)
        flat = kind([start(0, name, dtype)])
        assert torch.equal(flat.weights(dtype, False)[f"0.{name}"], dequantize(*layer))
        generator = torch.Generator().manual_seed(0)
        flat.log_change.uniform_(-0.5, 0.5, generator=generator)
        for latent in flat.latents:
            latent += torch.empty_like(latent).uniform_(-0.5, 0.5, generator=generator)
        moved = flat.rounded()[f"0.{name}"]
        assert not torch.equal(moved.scales, layer.scales)
        assert torch.equal(moved.codes, layer.codes) == (not flat.latents)
        assert torch.equal(flat.weights(dtype, False)[f"0.{name}"], dequantize(*moved))


@pytest.mark.parametrize("latent_rate", [0.0, 1e-3])
def test_gradients_are_those_of_the_whole_model(latent_rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's gradients, by capturing what the optimizer gets, against autograd through slow float64 formulas."""
    seen: list[Tensor] = []
    step = torch.optim.Adam.step

    def capture(optimizer: torch.optim.Adam) -> None:
        seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", capture)
    batches = inputs(2)
    distill(
        trainable_blocks(torch.float32),
        DistillRows(batches, 1, comparisons(batches)),
        DistillSchedule(1, latent_rate=latent_rate),
    )
    latents, logs, gains = [], [], []
    hidden = batches[0].double()
    for block in range(2):
        weights = {}
        for name in FORMATS:
            codes, scales, zeros, _ = rounded(block, name, torch.float32)
            log = torch.zeros_like(scales, dtype=torch.float64).requires_grad_()
            levels = codes.double().view(WIDTH, scales.shape[1], -1)
            levels = levels if zeros is None else levels - zeros.double().unsqueeze(-1)
            moved = torch.zeros_like(levels).requires_grad_()  # straight through the rounding
            weights[name] = ((levels + moved) * (scales.double() * log.exp()).unsqueeze(-1)).view(WIDTH, WIDTH)
            latents.append(moved)
            logs.append(log)
        change = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
        begin = gain(block).float().double()
        weights["norm"] = begin + begin.square().mean().sqrt() * change
        gains.append(change)
        hidden = forward(weights, hidden, 0)
    divergences(hidden, batches[0]).mean().backward()
    # The first two layers of a block have groups of one width, hence flat tensors together.
    expected = [*(_flat(latents) if latent_rate else []), *_flat(logs), *(change.grad for change in gains)]
    for found, exact in zip(seen, expected, strict=True):
        assert exact is not None
        error = (found.double().flatten() - exact.flatten()).norm() / exact.norm()
        assert float(error) < 1e-5


def _flat(leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the layers of each block, those of one width of groups together."""
    found = [leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]
    return [part for n in range(0, len(found), 3) for part in (torch.cat(found[n : n + 2]), found[n + 2])]


def heldout_divergence(layers: Mapping[str, Quantized], gains: list[Tensor]) -> float:
    """Mean over the held-out rows, from layers and gains alone, in float64."""
    total = 0.0
    for x in inputs(8)[6:]:
        hidden = x.double()
        for block, norm in enumerate(gains):
            weights = {name: dequantize(*layers[f"{block}.{name}"]).double() for name in FORMATS}
            hidden = forward(weights | {"norm": norm.double()}, hidden, 0)
        total += float(divergences(hidden, x).sum())
    return total / (2 * ROWS)


def test_held_out_divergence_falls_and_is_what_the_result_gives() -> None:
    found = run(DistillSchedule(60, scale_rate=5e-3, gain_rate=5e-3))
    starts = {f"{block}.{name}": rounded(block, name, torch.bfloat16) for block in range(2) for name in FORMATS}
    gains = [gain(block).float().bfloat16() for block in range(2)]
    assert found.log.before == pytest.approx(heldout_divergence(starts, gains), rel=1e-3)
    assert all(torch.equal(found.layers[name].codes, layer.codes) for name, layer in starts.items())
    after = heldout_divergence(found.layers, [learned["norm"] for learned in found.gains])
    assert found.log.after == pytest.approx(after, rel=1e-3)
    assert found.log.after < 0.9 * found.log.before
    assert found.log.best_step > 0


def test_nothing_is_learned_from_held_out_batches() -> None:
    """They only judge, and the others only teach."""
    batches, taught, judged = inputs(8), set[int](), set[int]()

    class Noting(Comparison):
        def divergence(self, hidden: Tensor) -> Tensor:
            judged.add(next(i for i, batch in enumerate(batches) if batch is self.batch))
            return super().divergence(hidden)

        def gradient(self, hidden: Tensor) -> Tensor:
            taught.add(next(i for i, batch in enumerate(batches) if batch is self.batch))
            return super().gradient(hidden)

    distill(
        trainable_blocks(torch.bfloat16),
        DistillRows(batches, 6, [Noting(batch) for batch in batches]),
        DistillSchedule(12),
    )
    assert (taught, judged) == (set(range(6)), {6, 7})


def test_codes_are_learned_within_their_limits() -> None:
    rates = {"scale_rate": 5e-3, "gain_rate": 5e-3}
    fixed, found = run(DistillSchedule(60, **rates)), run(DistillSchedule(60, latent_rate=5e-3, **rates))
    after = heldout_divergence(found.layers, [learned["norm"] for learned in found.gains])
    assert found.log.after == pytest.approx(after, rel=1e-3)
    assert found.log.after < 0.9 * fixed.log.after
    for block in range(2):
        for name, fmt in FORMATS.items():
            begin, end = rounded(block, name, torch.bfloat16).codes, found.layers[f"{block}.{name}"].codes
            moved = end.short() - begin.short()
            assert 0 < int(moved.abs().max()) <= 2  # an offset may start near the border and go one code further
            assert fmt.min_code <= int(end.min()) and int(end.max()) <= fmt.max_code


def test_what_makes_nothing_better_changes_nothing() -> None:
    for schedule in (DistillSchedule(0), DistillSchedule(5, scale_rate=100.0, gain_rate=100.0)):
        found = run(schedule)
        assert (found.log.best_step, found.log.after) == (0, found.log.before)
        assert torch.equal(found.gains[1]["norm"], gain(1).float().bfloat16())


def test_the_same_seed_gives_the_same() -> None:
    first, again, other = (run(DistillSchedule(7, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first.layers[name].scales, again.layers[name].scales) for name in first.layers)
    assert first.log.after == again.log.after != other.log.after


@pytest.mark.parametrize("message", ["op does not have a deterministic implementation", "something else"])
def test_a_fixed_order_is_given_up_where_there_is_none(message: str) -> None:
    seen: list[bool] = []

    def work() -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seen[-1]:
            raise RuntimeError(message)

    order = FixedOrder(torch.device("cuda"))
    if "deterministic" in message:
        order.run(work)
        order.run(work)
        assert seen == [True, False, False] and not order.kept
    else:
        with pytest.raises(RuntimeError, match=message):
            order.run(work)
        assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    order, seen[:] = FixedOrder(torch.device("cpu")), []
    order.run(work)
    assert seen == [False] and order.kept


def test_every_batch_comes_before_any_comes_again() -> None:
    order = batch_order(4, 10, 3)
    assert len(order) == 10 and sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert batch_order(4, 10, 3) == order != batch_order(4, 10, 4)


def test_outputs_that_are_not_finite_are_an_error() -> None:
    batches = [torch.full((1, 1, WIDTH), torch.inf) for _ in range(2)]
    with pytest.raises(NumericalError, match="rounded model"):
        distill(trainable_blocks(torch.float32), DistillRows(batches, 1, comparisons(batches)), DistillSchedule(1))


def test_steps_that_make_it_worse_at_first_do_not_end_it() -> None:
    """Rates so large that no check before the end is better than the start; the last steps are small."""
    log = run(DistillSchedule(20, latent_rate=0.3, scale_rate=0.3, gain_rate=0.3)).log
    assert (log.steps, log.best_step) == (20, 0)


def test_a_margin_keeps_the_first_steps_from_moving_codes() -> None:
    layers = [start(0, name, torch.bfloat16) for name in ("in", "mid")]
    plain, kept = FlatLayers(layers, 1.0), FlatLayers(layers, 1.0, margin=0.1)
    assert float((kept.latent - kept.latent.round()).abs().max()) <= 0.4 < float((plain.latent % 1 - 0.5).abs().max())
    for flat in (plain, kept):
        flat.latent += 0.09
    moved = [int((flat.latent.round() != torch.cat([s.rounded.codes.view(-1, flat.width) for s in layers])).sum())
             for flat in (plain, kept)]  # fmt: skip
    assert moved[0] > 0 == moved[1]
