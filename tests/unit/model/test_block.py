"""Weights of a loaded block: read, replaced, and others while a context lasts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hawqtool.formats import QuantFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.records import BlockSpec, LinearSpec
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.rounding.statistics import second_moments

WIDTH, INNER, ROWS = 32, 48, 64


class Block(nn.Module):
    """Two linears, of which the first is stored as ``[in, out]``, and a gain; gives a tuple as blocks may."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Module(), nn.Linear(INNER, WIDTH, bias=False)
        self.up.weight = nn.Parameter(torch.randn(WIDTH, INNER))
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor, factor: float = 1.0) -> tuple[Tensor]:
        return (hidden + factor * self.down(torch.tanh(hidden * self.gain @ self.up.weight)),)


UP = LinearSpec("h.0.up", INNER, WIDTH, 0, "up", 4, transposed=True)
DOWN = LinearSpec("h.0.down", WIDTH, INNER, 0, "down", 4)


@pytest.fixture
def block() -> LoadedBlock:
    torch.manual_seed(0)
    return LoadedBlock(Block().requires_grad_(False), BlockSpec(0, "h.0", ((UP,), (DOWN,))))


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_weight_is_out_by_in_however_it_is_stored(block: LoadedBlock) -> None:
    assert block.weight(UP).shape == (INNER, WIDTH) and block.parameter(UP).shape == (WIDTH, INNER)
    assert block.weight(UP).is_contiguous() and torch.equal(block.weight(DOWN), block.parameter(DOWN))
    block.set_weight(UP, torch.zeros(INNER, WIDTH))
    assert not block.weight(UP).any()


def test_other_weights_last_as_long_as_the_context(block: LoadedBlock, hidden: Tensor) -> None:
    call = ((), {"factor": 2.0})
    before = [parameter.clone() for parameter in block.module.parameters()]
    changed = block.copy()
    errors = {linear.name: torch.randn_like(block.weight(linear)) for linear in (UP, DOWN)}
    for linear in (UP, DOWN):
        changed.set_weight(linear, changed.weight(linear) + errors[linear.name])
    with block.with_weights(block.shifted(errors)):
        assert torch.equal(block.run(hidden, call), changed.run(hidden, call))
    with (
        pytest.raises(AttributeError, match="lost"),
        block.with_weights({**block.shifted(errors), "lost.weight": hidden}),
    ):
        pass
    assert all(torch.equal(old, new) for old, new in zip(before, block.module.parameters(), strict=True))
    assert all(isinstance(parameter, nn.Parameter) for parameter in block.module.parameters())


def test_gradients_reach_the_weights_that_are_given(block: LoadedBlock, hidden: Tensor) -> None:
    given = {
        UP.name: block.weight(UP).clone().requires_grad_(),
        "gain": torch.full((WIDTH,), 2.0, requires_grad=True),
    }
    with block.with_weights(given):
        block.run(hidden, ((), {})).square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in given.values())
    assert not block.parameter(UP).requires_grad


def test_a_spec_rounds_what_its_menu_names(block: LoadedBlock) -> None:
    menu = {"down": (QuantFormat(2, 16), QuantFormat(4, 16))}
    spec = RoundingSpec(RoundingMethod("gptq"), menu, {DOWN.name: torch.float32})
    statistics = second_moments(torch.randn(ROWS, INNER), ROWS)
    errors = spec.errors(block, (UP, DOWN), statistics)
    assert list(errors) == [DOWN.name] and list(errors[DOWN.name]) == ["w2g16", "w4g16"]
    narrow, wide = (float(errors[DOWN.name][label].square().sum()) for label in ("w2g16", "w4g16"))
    assert 0 < wide < narrow
    assert not spec.errors(block, (UP,), statistics)


def test_a_refiner_has_the_last_word_on_a_block(block: LoadedBlock) -> None:
    seen = []

    def refiner(loaded: LoadedBlock, states: object, initial: dict) -> dict:
        seen.append((loaded, states, list(initial)))
        return {}

    spec = RoundingSpec(RoundingMethod("rtn"), {"down": (QuantFormat(4, 16),)}, {DOWN.name: torch.float32}, refiner)
    states = (torch.zeros(1),)
    assert spec.block_errors(block, [((DOWN,), second_moments(torch.randn(ROWS, INNER), ROWS))], states) == {}
    assert seen == [(block, states, [DOWN.name])]
