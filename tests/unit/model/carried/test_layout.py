"""Tensors of any dtype and shape survive being packed into one, to the bit, also in two bytes a number."""

from __future__ import annotations

import torch

from hawqtool.model.carried.layout import Layout, Leaf

ROWS, POSITIONS = 3, 5
BOTH = Layout(
    (
        Leaf((1, 0), (1, POSITIONS, 4), torch.float32, 0, 1),
        Leaf((0, 1), (2, 1, POSITIONS, 3), torch.bfloat16, 1, 2),
        Leaf((0, 2), (1, POSITIONS, 2), torch.int64, 0, 1),
        Leaf((0, 3), (1, 2, POSITIONS), torch.bool, 0, 2),
        Leaf((0, 4), (7, 1), torch.float32, 1, None),
        Leaf((0, 5), (1, 3), torch.int32, 0, None),
    ),
    POSITIONS,
)


def random_values(layout: Layout) -> dict[tuple[int, int], torch.Tensor]:
    values = {}
    for leaf in layout.leaves:
        numbers = torch.randn(leaf.of_rows(ROWS)) * 1000
        values[leaf.name] = numbers > 0 if leaf.dtype is torch.bool else numbers.to(leaf.dtype)
    return values


def test_what_is_packed_comes_back_with_its_dtype() -> None:
    values = random_values(BOTH)
    packed = BOTH.pack(values)
    assert packed.shape[:2] == (ROWS, POSITIONS) and packed.dtype is torch.float32
    found = BOTH.unpack(packed)
    for name, value in values.items():
        assert found[name].dtype is value.dtype and torch.equal(found[name], value), name
    # Integers stay exact where hidden states are kept in two bytes; rows can be cut out and put together.
    for dtype in (torch.bfloat16, torch.float16):
        found = BOTH.unpack(torch.cat([packed[:1], packed[1:]]).to(dtype))
        assert all(torch.equal(found[name], values[name]) for name in ((0, 2), (0, 3), (0, 5)))


def test_a_single_hidden_state_is_not_touched() -> None:
    layout = Layout((Leaf((0, 0), (1, POSITIONS, 4), torch.float32, 0, 1),), POSITIONS)
    hidden = torch.randn(ROWS, POSITIONS, 4)
    assert layout.pack({(0, 0): hidden}).data_ptr() == hidden.data_ptr()
    assert layout.unpack(hidden)[0, 0].data_ptr() == hidden.data_ptr()


def test_gradients_flow_through_floats_alone() -> None:
    values = random_values(BOTH)
    packed = BOTH.pack(values).requires_grad_()
    found = BOTH.unpack(packed)
    sum(found[leaf.name].float().sum() for leaf in BOTH.leaves).backward()  # type: ignore[union-attr]
    assert packed.grad is not None
    floats = sum(value.numel() for value in values.values() if value.is_floating_point())
    assert float(packed.grad.sum()) == floats
